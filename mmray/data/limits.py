"""Limits checked before any work: ids are unique, and a label has few values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from mmray.data import locations
from mmray.data.rows import BadRowError, given_id, label_text
from mmray.data.shards import Manifest
from mmray.data.source import Source
from mmray.errors import InputError

MOST_LABELS = 256
"""Most values of one kind of label. Each value costs 17 MB per shard for a model of 350,000 neurons."""
FIXED = ("language", "domain")
"""Kinds of labels that have an option of their own."""

Range = tuple[str, int, int]
"""Samples of one file: its path, the first sample, and the one after the last."""


def check_columns(source: Source, manifest: Manifest) -> None:
    """Check the ids and labels of all rows in the manifest, without reading images.

    Raises `InputError` for an id that occurs twice, and for a label with more than MOST_LABELS values.
    """
    named = {kind: getattr(source.columns, kind) for kind in FIXED} | {name: name for name in source.columns.labels}
    labels = {kind: column for kind, column in named.items() if column is not None}
    column = source.columns.sample_id
    if column is None and not labels:
        return
    ranges = _ranges(manifest)
    hashes = locations.concurrently(lambda part: _hashes(source, part, labels), ranges)
    for kind in labels:
        _check_label(source, kind, len(np.unique(np.concatenate([part[kind] for part in hashes]))))
    if column is not None:
        ids = np.sort(np.concatenate([part[""] for part in hashes]))
        # Equal hashes are only suspects: the ids themselves are compared in a second pass.
        _check_ids(source, column, ranges, frozenset(ids[1:][ids[1:] == ids[:-1]].tolist()))


def _ranges(manifest: Manifest) -> list[Range]:
    """Return the manifest's samples as ranges of files, joined where they touch: two shards may share a row."""
    ranges: list[Range] = []
    for piece in (piece for shard in manifest.shards for piece in shard.pieces):
        if ranges and ranges[-1][0] == piece.path and ranges[-1][2] == piece.start:
            ranges[-1] = (piece.path, ranges[-1][1], piece.stop)
        else:
            ranges.append((piece.path, piece.start, piece.stop))
    return ranges


def _hashes(source: Source, part: Range, labels: Mapping[str, str]) -> dict[str, Int64[ndarray, " value"]]:
    """Return hashes of the ids (under "") and of the distinct values of each label."""
    # Hashes, because ten million strings would take a gigabyte.
    ids: list[int] = []
    values: dict[str, set[int]] = {kind: set() for kind in labels}
    id_column = source.columns.sample_id
    for record in _records(source, part, [*labels.values(), id_column]):
        if sample_id := given_id(record.get(id_column)) if id_column is not None else "":
            # Python salts `hash` per process, but these hashes never leave it.
            ids.append(hash(sample_id))
        for kind, column in labels.items():
            try:
                label = label_text(record.get(column), column)
            except BadRowError:
                continue  # `read` reports this row.
            if label is not None:
                values[kind].add(hash(label))
    return {"": np.array(ids, np.int64)} | {kind: np.array(list(own), np.int64) for kind, own in values.items()}


def _check_label(source: Source, kind: str, count: int) -> None:
    # Each value has sums of its own for every neuron.
    if count > MOST_LABELS:
        without = f"--{kind}-column none" if kind in FIXED else f"no --label-column {kind}"
        raise InputError(
            f"{source.data}: {kind} has {count:,} values, more than {MOST_LABELS}; every neuron is counted for each: "
            f"name a column with fewer, or use {without}"
        )


def _check_ids(source: Source, column: str, ranges: list[Range], suspects: frozenset[int]) -> None:
    """Raise `InputError` if two rows have the same id; only ids with these hashes can be repeated."""
    seen: set[str] = set()
    repeated: list[str] = []
    for part in ranges if suspects else ():
        for record in _records(source, part, [column]):
            sample_id = given_id(record.get(column))
            if hash(sample_id) in suspects:
                repeated += [sample_id] if sample_id in seen else []
                seen.add(sample_id)
    if repeated:
        rows = "1 row has" if len(repeated) == 1 else f"{len(repeated):,} rows have"
        raise InputError(
            f"{source.data}: {rows} the id of an earlier row in column {column!r}, the first {repeated[0][:80]!r}; "
            "name another column with --id-column, or use --id-column none for digests of image and caption"
        )


def _records(source: Source, part: Range, columns: list[str | None]) -> Iterator[Mapping[str, object]]:
    names = list(dict.fromkeys(name for name in columns if name is not None))
    return (record for record in source.cells(names, *part) if not isinstance(record, str))
