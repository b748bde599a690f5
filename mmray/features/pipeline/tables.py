"""Tables of `mmray pipeline`: its edits, their measures, and captions before and after each edit."""

from __future__ import annotations

import pyarrow as pa

from mmray.features.evaluation.tables import PARTS
from mmray.runs.tables import field
from mmray.statistics.tables import INTERVAL

TABLES: dict[str, pa.Schema] = {
    "edits": pa.schema(
        [
            field("edit", pa.string(), "its name, which is also its folder in RUN/edits"),
            field("kind", pa.string(), "swap, suppress, hallucination or noise"),
            field("source", pa.string()),
            field("target", pa.string()),
            field(
                "pairs",
                pa.list_(pa.struct([field("context", pa.string()), field("word", pa.string())])),
                "for a hallucination edit: the object that is seen, and the word that the model claims with it",
            ),
            field("method", pa.string()),
            field("rows_changed", pa.int32(), "neurons"),
            field("parameters_changed", pa.int64(), "count"),
            field("norm", pa.float64(), "L2, of the whole change"),
            field("seconds", pa.float64()),
        ]
    ),
    "evaluations": pa.schema(
        [
            field("edit", pa.string()),
            field("measure", pa.string()),
            field("before", pa.float64()),
            field("after", pa.float64()),
            field("low", pa.float64(), f"of after: {INTERVAL}"),
            field("high", pa.float64(), f"of after: {INTERVAL}"),
            field("n", pa.int64(), "images; for text questions, prompts or passages, for MMEdit records"),
            field("protocol", pa.string()),
        ]
    ),
    "edit_captions": pa.schema([field("edit", pa.string()), *PARTS["captions"]]),
}
"""Tables that `mmray pipeline` adds to a run."""
