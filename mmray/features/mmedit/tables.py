"""Tables of `mmray mmedit` with units, and the parts that a unit of work commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import ERRORS, field
from mmray.statistics.tables import INTERVAL

_WHAT = [
    field("task", pa.string(), "E-VQA or E-IC"),
    field("method", pa.string()),
    field("edits", pa.int64(), "edits in place when measured; 1: each is undone before the next"),
]

TABLES: dict[str, pa.Schema] = {
    "mmedit": pa.schema(
        [
            *_WHAT,
            field("protocol", pa.string(), "published, token or corrected"),
            field("measure", pa.string(), "one of the paper's five, their harmonic mean, or one beyond the paper"),
            field("before", pa.float64(), "of the unedited model; null of the harmonic mean"),
            field("value", pa.float64()),
            field("low", pa.float64(), INTERVAL),
            field("high", pa.float64(), INTERVAL),
            field("n", pa.int64(), "images of records"),
            field("definition", pa.string()),
        ]
    ),
    "mmedit_edits": pa.schema(
        [
            *_WHAT,
            field("record", pa.int64(), "number in the file"),
            field("prompt", pa.string()),
            field("reply", pa.string(), "the unedited model's"),
            field("target", pa.string()),
            field("parameters", pa.int64(), "weights changed"),
            field("norm", pa.float64(), "L2 norm of the change"),
        ]
    ),
}
"""By name."""

PARTS: dict[str, pa.Schema] = {
    # Sums per record and measure, as in an evaluation: totals over records make a measure.
    "outcomes": pa.schema(
        [
            *_WHAT,
            field("measure", pa.string()),
            field("sample_id", pa.string(), "mmedit: and the record's number"),
            field("image", pa.string(), "the record's image, which several records may share"),
            field("before", pa.list_(pa.float64()), "share, and 1"),
            field("after", pa.list_(pa.float64()), "share, and 1"),
        ]
    ),
    "mmedit_edits": TABLES["mmedit_edits"],
    "errors": ERRORS,
}
"""By name."""
