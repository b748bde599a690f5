"""The tables that a unit of an evaluation commits."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import ERRORS, field

PARTS: dict[str, pa.Schema] = {
    # One row per sample and measure; a measure's value is a function of the totals over samples.
    "measurements": pa.schema(
        [
            field("measure", pa.string()),
            field("sample_id", pa.string()),
            field("image", pa.string(), "key of the image; null: of a question or record"),
            field("before", pa.list_(pa.float64()), "sums; most often what is counted, and of how many"),
            field("after", pa.list_(pa.float64()), "sums; most often what is counted, and of how many"),
        ]
    ),
    "captions": pa.schema(
        [
            field("sample_id", pa.string()),
            field("before", pa.string()),
            field("after", pa.string()),
            field("changed", pa.bool_()),
            field("role", pa.string(), "edited, source, unrelated or other"),
            field("image", pa.string(), "key of the image, which all samples of it share"),
        ]
    ),
    "errors": ERRORS,
}
"""By name."""
