"""Tables of `mmray properties`, and the parts that a unit commits."""

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
            field("strength", pa.float64(), "noise: σ as a fraction of the rows' RMS; amplification: the factor"),
            field("value", pa.float64()),
            field("low", pa.float64(), INTERVAL),
            field("high", pa.float64(), INTERVAL),
            field("n", pa.int64(), "images, or concepts for measures of a whole ranking such as its hit rate"),
            field("protocol", pa.string()),
        ]
    ),
    "heatmaps": pa.schema(
        [
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("method", pa.string(), "what ranked the neurons; `neuron`: a single one's map"),
            field("neurons", pa.int32(), "count"),
            field("rows", pa.int16(), "patches"),
            field("columns", pa.int16(), "patches"),
            field("values", pa.list_(pa.float32()), "mean activation of the neurons over each patch, row by row"),
            field("covers", pa.list_(pa.float32()), "x, y, width, height of the area of the patches, in 0..1"),
            field("box", pa.list_(pa.float32()), "x, y, width, height of the concept's object, in 0..1"),
            field("hit", pa.bool_(), "whether the highest point lies in the box; null without a box"),
            field("iou", pa.float32(), "of the box and the mask above the 95th percentile; null without a box"),
            field("neuron", pa.string(), "of a single one's map; null: of several"),
        ]
    ),
}
"""Tables that `mmray properties` adds to a run."""

PARTS: dict[str, pa.Schema] = {
    # One row per image and measure; a measure is a ratio of totals over images.
    "observations": pa.schema(
        [
            *(TABLES["properties"].field(name) for name in ("property", "measure", "method", "neurons", "strength")),
            field("concept", pa.string()),
            field("sample_id", pa.string()),
            field("value", pa.float64(), "sum"),
            field("of", pa.float64(), "denominator of the sum"),
        ]
    ),
    "heatmaps": TABLES["heatmaps"],
    "errors": ERRORS,
}
"""Parts that one unit of work commits."""
