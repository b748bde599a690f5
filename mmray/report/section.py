"""What a feature adds to a report: the data of its page, and the pictures on it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmray.report.concepts import number
from mmray.runs.run import Run


@dataclass(frozen=True)
class Request:
    """What a section is made from."""

    run: Run
    edits: Sequence[str] = ()
    """Folders of edits to show, in addition to those in the run."""


@dataclass(frozen=True)
class Section:
    """A feature's part in a report."""

    page: Any
    """Lists and numbers, which its script finds as `INDEX[feature]`."""
    samples: Sequence[str] = ()
    """Samples of the run whose images the page shows."""
    elsewhere: Sequence[tuple[str, frozenset[str]]] = ()
    """Data, and its samples whose images the page shows, for data other than the run's."""


def map_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table row's map with one byte per value, scaled between the map's minimum and maximum."""
    values = np.array(row["values"], dtype=np.float64)
    low, high = float(np.min(values)), float(np.max(values))
    # A byte per value: a report holds thousands of maps. A constant map has no range to divide by.
    levels = np.rint(255 * (values - low) / ((high - low) or 1.0)).astype(np.uint8)
    return {
        "rows": row["rows"],
        "columns": row["columns"],
        "low": number(low),
        "high": number(high),
        "values": base64.b64encode(levels.tobytes()).decode(),
        # None means the whole image, as almost always.
        "covers": row["covers"] if row["covers"] != [0.0, 0.0, 1.0, 1.0] else None,
        "hit": row["hit"],
    }
