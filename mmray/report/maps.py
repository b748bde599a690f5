"""Heat maps in the form that pages hold them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmray.report.concepts import number


def map_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table row's map with one byte per value, scaled between the map's minimum and maximum."""
    values = np.array(row["values"], dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    levels = np.rint(255 * (values - low) / ((high - low) or 1.0)).astype(np.uint8)
    return {
        "rows": row["rows"],
        "columns": row["columns"],
        "low": number(low),
        "high": number(high),
        "values": base64.b64encode(levels.tobytes()).decode(),
        "covers": row["covers"] if row["covers"] != [0.0, 0.0, 1.0, 1.0] else None,
        "hit": row["hit"],
    }
