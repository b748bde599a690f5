"""Over all shards: how often a neuron is in the top-k of a concept's occurrences, and of how many images these are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt64
from numpy import ndarray

COMPACT_AT = 1 << 20
"""Pairs of concept and neuron that are collected, at least, before they are counted together."""
PAIR = np.dtype([("concept", np.int64), ("image", np.uint64)])


class Hits:
    """Counts of (concept, neuron) pairs, held as sorted arrays: memory goes with the pairs, not the occurrences."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.starts = np.cumsum([0, *widths])
        self.concepts: dict[str, int] = {}
        self._pairs = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[tuple[ndarray, ndarray]] = []

    def add(self, occurrences: pa.Table) -> None:
        """Take in rows of `occurrences`."""
        if not len(occurrences):
            return
        lists = occurrences["neurons"].combine_chunks()
        entries = lists.flatten()
        neuron = self.starts[entries.field("layer").to_numpy()] + entries.field("unit").to_numpy()
        names = occurrences["concept"].to_pylist()
        concept = np.array([self.concepts.setdefault(name, len(self.concepts)) for name in names], np.int64)
        pairs = concept.repeat(lists.value_lengths().to_numpy()) * self.starts[-1] + neuron
        self._pending.append(np.unique(pairs, return_counts=True))
        if sum(len(found) for found, _ in self._pending) > max(COMPACT_AT, len(self._pairs)):
            self._compact()

    def counts(self) -> dict[str, tuple[Int64[ndarray, " neuron"], Int64[ndarray, " neuron"]]]:
        """Return for each concept its neurons, in order of their index over all layers, and their counts."""
        self._compact()
        bounds = np.searchsorted(self._pairs, np.arange(len(self.concepts) + 1) * self.starts[-1])
        own = {name: slice(*bounds[index : index + 2]) for name, index in self.concepts.items()}
        return {name: (self._pairs[part] % self.starts[-1], self._counts[part]) for name, part in own.items()}

    def _compact(self) -> None:
        pairs = np.concatenate([self._pairs, *(found for found, _ in self._pending)])
        counts = np.concatenate([self._counts, *(count for _, count in self._pending)])
        self._pairs, inverse = np.unique(pairs, return_inverse=True)
        self._counts = np.zeros(len(self._pairs), np.int64)
        np.add.at(self._counts, inverse, counts)
        self._pending = []


class ConceptImages:
    """The different images of each concept's occurrences, as sorted pairs of concept and image."""

    def __init__(self) -> None:
        self.concepts: dict[str, int] = {}
        self._pairs = np.zeros(0, PAIR)
        self._pending: list[ndarray] = []

    def add(self, concepts: Sequence[str], images: UInt64[ndarray, " occurrence"]) -> None:
        """Take in a shard's occurrences: the concept and the image of each."""
        pairs = np.empty(len(concepts), PAIR)
        pairs["concept"] = [self.concepts.setdefault(name, len(self.concepts)) for name in concepts]
        pairs["image"] = images
        self._pending.append(_distinct(pairs))
        if sum(map(len, self._pending)) > max(COMPACT_AT, len(self._pairs)):
            self._compact()

    def counts(self) -> dict[str, int]:
        """Return the number of different images of each concept."""
        self._compact()
        counts = np.bincount(self._pairs["concept"], minlength=len(self.concepts)).tolist()
        return {name: counts[index] for name, index in self.concepts.items()}

    def _compact(self) -> None:
        self._pairs = _distinct(np.concatenate([self._pairs, *self._pending]))
        self._pending = []


def _distinct(pairs: ndarray) -> ndarray:
    # Faster than `np.unique`, which compares records one by one.
    pairs = pairs[np.lexsort((pairs["image"], pairs["concept"]))]
    new = (pairs["concept"][1:] != pairs["concept"][:-1]) | (pairs["image"][1:] != pairs["image"][:-1])
    distinct: ndarray = pairs[np.concatenate([np.ones(min(len(pairs), 1), bool), new])]
    return distinct


def image_numbers(captions: pa.Table) -> UInt64[ndarray, " sample"]:
    """Return a number per row of `captions` that rows of one image share; a sample without an image has its own.

    They are 64 bits of digests, so that no list of all images has to be kept.
    """
    names = captions["sample_id"].to_pylist()
    images = captions["image"].to_pylist() if "image" in captions.column_names else [None] * len(names)
    return np.array(
        [
            int(image or hashlib.sha256(b"\0" + name.encode()).hexdigest()[:16], 16)
            for name, image in zip(names, images, strict=True)
        ],
        np.uint64,
    )
