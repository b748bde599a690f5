"""Columns of a measured value: its interval, its n, and how it was measured."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field

INTERVAL = "95 %, over images: Wilson of shares, else bootstrap"

MEASURED = (
    field("value", pa.float64()),
    field("low", pa.float64(), INTERVAL),
    field("high", pa.float64(), INTERVAL),
    field("n", pa.int64(), "claims, answers or samples"),
    field("protocol", pa.string()),
)
