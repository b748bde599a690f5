"""Ranges of neurons and of concepts: the pieces of a large model's parts, so that a merge can read one range alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from mmray.features.census.bytes_written import PER_NEURON
from mmray.runs import Receipt, RunFolder
from mmray.runs.pieces import cut_between, cut_lists, cut_rows, in_pieces, piece, whole_name
from mmray.storage import with_retries

NEURONS = 1 << 16
"""Neurons per range. A model without more has all its parts whole."""
PIECE = 2 << 20
"""Bytes in memory of a piece of `concepts`, at least: smaller ones take longer to read than their bytes are worth."""
MOST = 32
"""Pieces of `concepts` per shard, at most: each is a file, and a line of the receipt."""


def neuron_ranges(modules: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Return first neuron and length of each range, given the widths of the language model's layers and other modules'.

    Other modules are cut alike; of a smaller one the last ranges are empty.
    """
    neurons, *others = map(sum, modules)
    if neurons <= NEURONS:
        return [(0, neurons)]
    return [(first, max(0, min(NEURONS, neurons - first))) for first in range(0, max(neurons, *others, 0), NEURONS)]


class SharedCuts:
    """The concepts at which the shards of a run are cut: those of shard 0, so that a merge reads each piece once.

    Shards that are finished before it are cut where it suits them. The tables do not depend on it.
    """

    def __init__(self, run: str) -> None:
        """Take the address of the run."""
        self.run = run
        self._found: list[str] = []

    def read(self) -> list[str]:
        """Return the concepts; none while shard 0 is not committed."""
        if not self._found:
            first = with_retries(lambda: RunFolder.at(self.run).receipt(0))
            self._found = cuts_in(first) if first else []
        return self._found


def cuts_in(receipt: Receipt) -> list[str]:
    """Return the concepts at which a shard's pieces begin, without the first piece's."""
    return list(dict.fromkeys(receipt.bounds[part]["concept"][0] for part in pieces_of(receipt, "concepts")[1:]))


def cut_parts(parts: Mapping[str, pa.Table], ranges: int, cuts: Sequence[str]) -> dict[str, pa.Table]:
    """Return a shard's parts in pieces: those per neuron by ranges of neurons, concepts where `cuts` says.

    Without cuts, pieces of concepts have about the same size.
    """
    found = dict(parts)
    if ranges > 1:
        for name in PER_NEURON:
            found |= in_pieces(name, cut_lists(found.pop(name), NEURONS, ranges))
        concepts = found.pop("concepts")
        if cuts:
            pieces = cut_between(concepts, "concept", cuts)
        else:
            pieces = cut_rows(concepts, "concept", max(PIECE, -(-concepts.nbytes // MOST)))
        found |= in_pieces("concepts", pieces)
    return found


def is_cut(receipt: Receipt) -> bool:
    """Return whether a shard's parts are in pieces."""
    return piece(PER_NEURON[0], 0) in (receipt.parts or {})


def pieces_of(receipt: Receipt, name: str) -> list[str]:
    """Return the names of a part's pieces, or its own if it is whole; in order."""
    return [part for part in receipt.parts or {} if whole_name(part) == name]


def pieces_within(receipt: Receipt, name: str, first: str, end: str | None) -> list[str]:
    """Return the pieces, sorted by concept, that may hold concepts from `first` to before `end`."""
    found = []
    for part in pieces_of(receipt, name):
        lowest, highest = receipt.bounds[part]["concept"]
        if lowest is not None and highest >= first and (end is None or lowest < end):
            found.append(part)
    return found
