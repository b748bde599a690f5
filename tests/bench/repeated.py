"""The run of `merge`: a few shards, read over and over. Workers import this and no more, as those of a merge do."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from mmray.engine import Parts
from mmray.features.census.partial_merge import MergeContext
from mmray.features.census.ranges import pieces_of
from mmray.features.census.tables import PARTS
from mmray.runs import Receipt, RunFolder
from mmray.runs.pieces import whole_name
from mmray.runs.tables import list_column
from mmray.storage import LocalStore

CONCEPTS, SAMPLES = 600, 256
"""Of a shard."""
VOCABULARY = 20_000
SAMPLED = 32
"""Shards that say where the vocabulary is cut."""


class Repeated(RunFolder):
    """A run of so many shards that reads the drawn ones over and over, each time with other concepts and samples."""

    spent: ClassVar[float] = 0.0
    """CPU seconds that this process spent on making one shard look like another; the merge is not charged for them."""
    counted: ClassVar[float] = 0.0
    """CPU seconds of this process that are charged to units."""
    lock: ClassVar[Lock] = Lock()

    def __init__(self, out: Path, count: int) -> None:
        super().__init__(LocalStore(out / "drawn"))
        self.count = count
        self._drawn = super().receipts()

    def receipts(self) -> dict[int, Receipt]:
        return {number: self._receipt(number) for number in range(self.count)}

    def _receipt(self, number: int) -> Receipt:
        drawn, names = self._drawn[number % len(self._drawn)], self.names(number)
        places = {part: self._rows(drawn, part) for part in pieces_of(drawn, "concepts")}
        bounds = {part: {"concept": [names[rows.start], names[rows.stop - 1]]} for part, rows in places.items()}
        return replace(drawn, shard_id=number, bounds=bounds)

    def names(self, number: int) -> list[str]:
        """Return the concepts of a shard, in order."""
        checksums = self._drawn[0].checksums or {}
        return concepts_of(number, tuple(checksums[part].rows or 0 for part in pieces_of(self._drawn[0], "concepts")))

    def _rows(self, drawn: Receipt, name: str) -> slice:
        """Return which rows of a part are in a piece."""
        assert drawn.checksums is not None
        before = pieces_of(drawn, whole_name(name))
        rows = [drawn.checksums[part].rows or 0 for part in before[: before.index(name) + 1]]
        return slice(sum(rows[:-1]), sum(rows))

    def read_part(self, receipt: Receipt, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        drawn = self._drawn[receipt.shard_id % len(self._drawn)]
        table = super().read_part(drawn, name, columns)
        began = time.thread_time()
        table = self._renamed(table, receipt.shard_id, name, self._rows(drawn, name))
        with self.lock:
            Repeated.spent += time.thread_time() - began
        return table

    def _renamed(self, table: pa.Table, number: int, name: str, rows: slice) -> pa.Table:
        """Return a part of a drawn shard, or a piece with these rows, as that of a shard with this number."""
        if name == "captions":
            ids, images = _named("-{:04d}-0123456789abcdef", number), _named("{:08x}", number, 5)
            table = with_columns(table, sample_id=ids[: len(table)], image=images[: len(table)])
            return with_columns(table, shard_id=pa.array(np.full(len(table), number, np.int32)))
        if whole_name(name) == "concepts":
            return with_columns(table, concept=pa.array(self.names(number)[rows]))
        if name == "occurrences":
            names = np.array(self.names(number), object)[table["token_id"].to_numpy()]
            ids = _named("-{:04d}-0123456789abcdef", number).take(table["position"].combine_chunks())
            return with_columns(table, concept=pa.array(names, pa.string()), sample_id=ids)
        if whole_name(name) == "examples":
            column = table["activation"].combine_chunks()
            values = column.flatten().to_numpy().reshape(len(table), -1)
            # A neuron's activations of a shard grow and shrink together, each neuron's by itself.
            scales = _scales()
            first = np.random.default_rng([number, int(name.partition(".")[2] or 0)]).integers(len(scales) // 2)
            return with_columns(
                table, activation=list_column(values * scales[first : first + values.shape[1]], column.type)
            )
        return table


def with_columns(table: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


@cache
def _endings(ending: str, each: int) -> pa.Array:
    return pa.array([ending.format(row // each) for row in range(SAMPLES)])


def _named(ending: str, number: int, each: int = 1) -> pa.Array:
    """Return a text per sample of a shard; so many samples in turn share one."""
    return pc.binary_join_element_wise(f"{number:08x}", _endings(ending, each), "")


@cache
def _scales() -> ndarray:
    return np.exp(np.random.default_rng(0).standard_normal(1 << 20, np.float32) / 3)


@cache
def _nouns() -> tuple[np.ndarray, np.ndarray]:
    """Return the vocabulary and how likely each noun is."""
    letters = np.random.default_rng(7).integers(97, 123, (VOCABULARY, 9), np.uint8)
    names = np.array(sorted({bytes(row).decode() for row in letters}), object)
    chances = 1 / (np.random.default_rng(8).permutation(len(names)) + 20.0)
    return names, np.log(chances)


@cache
def _noise() -> ndarray:
    return np.random.default_rng(9).gumbel(size=1 << 22)


@cache
def _edges(pieces: tuple[int, ...]) -> list[int]:
    """Return where the vocabulary is cut, so that about so many of a shard's concepts lie in each piece."""
    names, chances = _nouns()
    noise = np.random.default_rng(0).gumbel(size=(SAMPLED, len(names)))
    places = np.sort(np.argpartition(-(chances + noise), CONCEPTS, axis=1)[:, :CONCEPTS].ravel())
    return [0, *places[SAMPLED * np.cumsum(pieces)[:-1]].tolist(), len(names)]


@cache
def concepts_of(number: int, pieces: tuple[int, ...]) -> list[str]:
    """Return the concepts of a shard, in order: drawn without replacement, so many in each piece.

    All shards of a run are cut at the concepts of shard 0.
    """
    names, _ = _nouns()
    places = _drawn(number, _edges(pieces) if number == 0 else _edges_of_first(pieces), pieces)
    return names[np.concatenate(places)].tolist()  # type: ignore[no-any-return]


@cache
def _edges_of_first(pieces: tuple[int, ...]) -> list[int]:
    first = _drawn(0, _edges(pieces), pieces)
    return [0, *(int(places[0]) for places in first[1:]), VOCABULARY]


def _drawn(number: int, edges: Sequence[int], pieces: tuple[int, ...]) -> list[ndarray]:
    """Return the places in the vocabulary of a shard's concepts, by piece, in order."""
    _, chances = _nouns()
    noise = _noise()
    start = np.random.default_rng(number).integers(len(noise) - len(chances))
    values = chances + noise[start : start + len(chances)]
    return [
        first + np.sort(np.argpartition(-values[first:end], count - 1)[:count])
        for (first, end), count in zip(pairwise(edges), pieces, strict=True)
    ]


TIMES, COMMIT = "times.jsonl", RunFolder.commit_shard
"""File with CPU seconds and peak memory of every unit, the worker's start counted with its first."""


def _timed_commit(folder: RunFolder, *work: Any, **more: Any) -> Receipt:
    receipt = COMMIT(folder, *work, **more)
    now = time.process_time() - Repeated.spent
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with Path(folder.store.uri, TIMES).open("a") as file:
        file.write(json.dumps([now - Repeated.counted, memory]) + "\n")
    Repeated.counted = now
    return receipt


class Timed:
    """A partial merge that notes what its units cost, without what makes shards look different."""

    def merger(self, context: RepeatedContext) -> Any:
        RunFolder.commit_shard = _timed_commit  # type: ignore[method-assign]
        return super().merger(context)  # type: ignore[misc]


@dataclass(frozen=True)
class RepeatedContext(MergeContext):
    """Reads the drawn shards over and over."""

    def parts(self) -> Parts:
        folder = Repeated(Path(self.run).parent, len(self.shards))
        return Parts(folder, folder.receipts(), PARTS)
