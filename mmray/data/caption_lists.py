"""Rows with a list of captions: each caption is a sample of the row's image.

Shards count samples, not rows. So the captions of every row are counted first, without reading the images.
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

RowStarts = Int[ndarray, "rows_and_one"]
"""The first sample of each row, and the number of samples."""


def row_starts(records: Iterable[Record], column: str) -> RowStarts:
    """Return where each record's samples start; a record that can't be read counts as one sample."""
    counts = [1 if isinstance(record, str) else len(captions_in(parse_list(record, column))) for record in records]
    return np.cumsum([0, *counts])


def has_lists(records: Iterable[Mapping[str, Any]], columns: Columns) -> bool:
    """Return whether any of these records has a list of captions."""
    return any(isinstance(parse_list(record, str(columns.caption)), list) for record in records)


def rows_holding(starts: RowStarts, start: int, stop: int) -> tuple[int, int]:
    """Return the range of rows (end exclusive) that holds samples `start` to `stop`."""
    # The last entry of `starts` is the number of samples, not a row.
    rows = len(starts) - 1
    return min(int(np.searchsorted(starts, start, "right")) - 1, rows), min(int(np.searchsorted(starts, stop)), rows)


def split_captions(
    records: Iterable[tuple[str, Record]], columns: Columns, starts: RowStarts, start: int, stop: int
) -> Iterator[tuple[str, Record]]:
    """Yield one record per sample from `start` to `stop`, given the rows that hold them.

    Where a row has several captions, the caption's number is appended to the sample id.
    """
    first, _ = rows_holding(starts, start, stop)
    split = (
        (source, part)
        for row, (source, record) in enumerate(records, first)
        for part in _split(record, columns, int(starts[row + 1] - starts[row]))
    )
    # The first and last row may reach beyond the range: two shards can share a row.
    yield from islice(split, start - int(starts[first]), stop - int(starts[first]))


def parse_lists(records: Iterable[tuple[str, Record]], columns: Columns) -> Iterator[tuple[str, Record]]:
    """Yield whole rows, with captions written as a JSON list parsed to a list."""
    column = str(columns.caption)
    for source, record in records:
        yield source, record if isinstance(record, str) else {**record, column: parse_list(record, column)}


def parse_list(record: Mapping[str, Any], column: str) -> Any:
    """Return a record's captions; text that is a JSON list, as CSV files have it, is parsed."""
    value = record.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _split(record: Record, columns: Columns, count: int) -> Iterator[Record]:
    captions = [] if isinstance(record, str) else captions_in(parse_list(record, str(columns.caption)))
    if isinstance(record, str) or len(captions) != count:
        # The row became unreadable, or changed, after it was counted. It still takes `count` samples: those after it
        # keep their numbers.
        reason = record if isinstance(record, str) else f"{len(captions)} captions, {count} when they were counted"
        yield from [reason] * count
        return
    sample_id = None if columns.sample_id is None else record.get(columns.sample_id)
    for number, caption in enumerate(captions):
        part = dict(record) | {str(columns.caption): caption}
        if count > 1 and isinstance(sample_id, str | int | float):
            part[str(columns.sample_id)] = f"{sample_id}-{number}"
        yield part
