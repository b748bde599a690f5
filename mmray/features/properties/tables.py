"""Tables of `mmray properties`, and what a unit of its work commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import ERRORS, field
from mmray.statistics.tables import INTERVAL

TABLES: dict[str, pa.Schema] = {
    "properties": pa.schema(
        [
            field("property", pa.string(), "sensitivity, specificity, causal, …"),
            field("measure", pa.string()),
            field("concept", pa.string(), "null: over all concepts measured"),
            field("method", pa.string(), "what ranked the neurons, or the control that drew them"),
            field("neurons", pa.int32(), "count"),
            field("strength", pa.float64(), "of noise: parts of the rows' own size; of amplification: the factor"),
            field("value", pa.float64()),
            field("low", pa.float64(), INTERVAL),
            field("high", pa.float64(), INTERVAL),
            field("n", pa.int64(), "images; of what a ranking as a whole has, such as its hit rate, concepts"),
            field("protocol", pa.string()),
        ]
    ),
    "heatmaps": pa.schema(
        [
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("method", pa.string(), "what ranked the neurons"),
            field("neurons", pa.int32(), "count"),
            field("rows", pa.int16(), "patches"),
            field("columns", pa.int16(), "patches"),
            field("values", pa.list_(pa.float32()), "mean activation of the neurons over each patch, row by row"),
            field("covers", pa.list_(pa.float32()), "x, y, width, height of what the patches cover, in its parts"),
            field("box", pa.list_(pa.float32()), "x, y, width, height of the concept's object, in parts of the image"),
            field("hit", pa.bool_(), "the highest point lies in the box; null without one"),
            field("iou", pa.float32(), "of the mask above the 95th percentile with the box; null without one"),
        ]
    ),
}
"""What it adds to a run."""

PARTS: dict[str, pa.Schema] = {
    # A row is an image's part in one measure; the totals over images make the measure.
    "observations": pa.schema(
        [
            *(TABLES["properties"].field(name) for name in ("property", "measure", "method", "neurons", "strength")),
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("value", pa.float64(), "sum"),
            field("of", pa.float64(), "what the sum is divided by"),
        ]
    ),
    "heatmaps": TABLES["heatmaps"],
    "errors": ERRORS,
}
"""What one unit of work of the properties commits."""
