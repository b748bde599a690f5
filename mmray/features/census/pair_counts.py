"""Counts of (concept, item) pairs over all shards: neurons in the top-k of occurrences, and images of occurrences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Shaped, UInt64
from numpy import ndarray

COMPACT_AT = 1 << 20
"""Fewest uncounted pairs that are collected before they are added up."""


class PairCounts:
    """How often each item occurs with each concept.

    Pairs are sorted arrays of 16 bytes per pair, so memory grows with the distinct pairs, not with the occurrences.
    """

    def __init__(self, dtype: type[np.int64 | np.uint64]) -> None:
        self.numbers: dict[str, int] = {}
        """Number of each concept, in order of appearance."""
        self._counted = (np.zeros(0, np.uint32), np.zeros(0, dtype), np.zeros(0, np.uint32))
        self._pending: list[tuple[ndarray, ndarray, ndarray]] = []

    def add(
        self, concepts: Sequence[str], items: Shaped[ndarray, " pair"], lengths: Int64[ndarray, " concept"] | int = 1
    ) -> None:
        """Count the items of each concept in turn: the first `lengths[0]` belong to the first concept, and so on."""
        numbers = [self.numbers.setdefault(concept, len(self.numbers)) for concept in concepts]
        concept = np.array(numbers, np.uint32).repeat(lengths)
        self._pending.append(_added_up(concept, items, np.ones(len(items), np.uint32)))
        # Waiting until as much is pending as is counted keeps the cost linear in the pairs.
        if sum(len(counts) for *_, counts in self._pending) > max(COMPACT_AT, len(self._counted[0])):
            self._compact()

    def of(self, concept: str) -> tuple[Shaped[ndarray, " item"], UInt64[ndarray, " item"]]:
        """Return the items of a concept in ascending order, and the count of each."""
        self._compact()
        concepts, items, counts = self._counted
        number = self.numbers.get(concept, len(self.numbers))
        # Of the array's own type: otherwise NumPy would convert the whole array for each call.
        part = slice(*np.searchsorted(concepts, np.array([number, number + 1], np.uint32)))
        return items[part], counts[part]

    def count(self, concept: str, items: Shaped[ndarray, " item"]) -> Int64[ndarray, " item"]:
        """Return the counts of these items with the concept, 0 for a pair that never occurred."""
        listed, counts = self.of(concept)
        if not len(listed):
            return np.zeros(len(items), np.int64)
        index = np.searchsorted(listed, items).clip(max=len(listed) - 1)
        found: Int64[ndarray, " item"] = np.where(listed[index] == items, counts[index], 0).astype(np.int64)
        return found

    def _compact(self) -> None:
        if self._pending:
            self._counted = _added_up(*map(np.concatenate, zip(self._counted, *self._pending, strict=True)))
            self._pending = []


def _added_up(concept: ndarray, item: ndarray, count: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Return the distinct pairs in order of concept and item, with the sums of their counts."""
    order = np.lexsort((item, concept))  # faster than np.unique on records, which compares them one by one
    concept, item, count = concept[order], item[order], count[order]
    # Equal pairs are neighbours now; each run of them starts where either half changes.
    changes = (concept[1:] != concept[:-1]) | (item[1:] != item[:-1])
    first = np.flatnonzero(np.concatenate([np.ones(min(len(item), 1), bool), changes]))
    return concept[first], item[first], np.add.reduceat(count, first, dtype=np.uint32)
