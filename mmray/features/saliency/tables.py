"""Tables of `mmray saliency` with units, and the parts that a unit of work commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import ERRORS, field
from mmray.statistics.tables import INTERVAL

TABLES: dict[str, pa.Schema] = {
    "saliency": pa.schema(
        [
            field("measure", pa.string(), "pointing_game, iou, max_box_accuracy, deletion, insertion"),
            field("method", pa.string(), "method of the maps, or chance"),
            field("value", pa.float64()),
            field("low", pa.float64(), INTERVAL),
            field("high", pa.float64(), INTERVAL),
            field("words", pa.int64(), "count"),
            field("n", pa.int64(), "images"),
            field("protocol", pa.string()),
        ]
    ),
    "saliency_maps": pa.schema(
        [
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("method", pa.string(), "method of the map"),
            field("rows", pa.int16(), "points"),
            field("columns", pa.int16(), "points"),
            field("values", pa.list_(pa.float32()), "in the method's own unit, row by row"),
            field(
                "covers",
                pa.list_(pa.float32()),
                "what the map covers of the image: x, y, width, height in 0..1",
            ),
            field("boxes", pa.list_(pa.list_(pa.float32())), "of the concept's object: x, y, width, height in 0..1"),
            field("hit", pa.bool_(), "the highest point lies in a box"),
        ]
    ),
}
"""By name."""

PARTS: dict[str, pa.Schema] = {
    # Sums per word: their totals over images make a measure, so the order of units cannot change it.
    "observations": pa.schema(
        [
            field("measure", pa.string()),
            field("method", pa.string()),
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("sums", pa.list_(pa.float64()), "the last one is the denominator of the others"),
        ]
    ),
    "saliency_maps": TABLES["saliency_maps"],
    "errors": ERRORS,
}
"""By name."""
