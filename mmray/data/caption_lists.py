"""Rows with a list of captions: each caption is a sample of the row's image.

Files are cut and read by samples, so the captions of their rows are counted first, without the images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from mmray.data.columns import Columns
from mmray.data.rows import Record, captions_in

Starts = Int[ndarray, "rows_and_one"]
"""The first sample of each row, and the number of samples."""


def starts_of(records: Iterable[Record], column: str) -> Starts:
    """Return where each record's samples start; one that can't be read is one."""
    counts = [1 if isinstance(record, str) else len(captions_in(cell(record, column))) for record in records]
    return np.cumsum([0, *counts])


def has_lists(records: Iterable[Mapping[str, Any]], columns: Columns) -> bool:
    """Return whether one of these records has a list of captions."""
    return any(isinstance(cell(record, str(columns.caption)), list) for record in records)


def rows_of(starts: Starts, start: int, stop: int) -> tuple[int, int]:
    """Return the rows, the last one left out, that hold samples `start` to `stop`."""
    rows = len(starts) - 1
    return min(int(np.searchsorted(starts, start, "right")) - 1, rows), min(int(np.searchsorted(starts, stop)), rows)


def one_by_one(
    records: Iterable[tuple[str, Record]], columns: Columns, starts: Starts, start: int, stop: int
) -> Iterator[tuple[str, Record]]:
    """Yield the records of samples `start` to `stop`, from those of the rows that hold them.

    An identifier gets the caption's number in its row, where there are several.
    """
    first, _ = rows_of(starts, start, stop)
    parted = (
        (source, part)
        for row, (source, record) in enumerate(records, first)
        for part in _parts(record, columns, int(starts[row + 1] - starts[row]))
    )
    yield from islice(parted, start - int(starts[first]), stop - int(starts[first]))


def lists_in(records: Iterable[tuple[str, Record]], columns: Columns) -> Iterator[tuple[str, Record]]:
    """Yield whole rows, their captions as a list where they are one, however it is written."""
    column = str(columns.caption)
    for source, record in records:
        yield source, record if isinstance(record, str) else {**record, column: cell(record, column)}


def _parts(record: Record, columns: Columns, count: int) -> Iterator[Record]:
    captions = [] if isinstance(record, str) else captions_in(cell(record, str(columns.caption)))
    if isinstance(record, str) or len(captions) != count:
        reason = record if isinstance(record, str) else f"{len(captions)} captions, {count} when they were counted"
        yield from [reason] * count
        return
    known = None if columns.sample_id is None else record.get(columns.sample_id)
    for number, caption in enumerate(captions):
        part = dict(record) | {str(columns.caption): caption}
        if count > 1 and isinstance(known, str | int | float):
            part[str(columns.sample_id)] = f"{known}-{number}"
        yield part


def cell(record: Mapping[str, Any], column: str) -> Any:
    """Return a record's captions; a text that is a JSON list, as CSV has it, is that list."""
    value = record.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
