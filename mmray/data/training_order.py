"""The order of training data: each step takes one sample from every slot of the batch.

    step      0   1   2  …
    slot 0    a   b   c  …     every epoch deals the shuffled shards to the slots
    slot 1    k   l   m  …     a worker owns some slots, and reads only their shards
    …

A step's samples depend only on the seed, not on the number of workers or on whether training was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest, Piece, Shard, cut, read_shard
from mmray.data.source import DataFile, Source


def cut_for_training(files: Sequence[DataFile], batch_size: int, shard_size: int, limit: int | None = None) -> Manifest:
    """Cut data into shards of at most `shard_size` samples, equally many per slot where the data allows it."""
    samples = sum(file.rows for file in files)
    samples = samples if limit is None else min(samples, limit)
    # A multiple of the slots, or some slots would be a whole shard longer than others.
    shards = ceil(samples / (shard_size * batch_size)) * batch_size
    return cut(files, max(1, ceil(samples / max(shards, 1))), limit)


@dataclass(frozen=True)
class TrainingOrder:
    """The order in which training visits the shards of its data."""

    manifest: Manifest
    batch_size: int
    """Slots: samples per step, over all workers."""
    seed: int

    def shards(self, epoch: int, slot: int) -> list[Shard]:
        """Return the shards of a slot in an epoch."""
        order = list(self.manifest.shards)
        # A string seeds the same in every process, unlike the hash of a tuple.
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order[slot :: self.batch_size]

    def steps(self, epoch: int) -> int:
        """Return the steps of an epoch: the samples of its longest slot. Every sample comes once."""
        lengths = (sum(shard.samples for shard in self.shards(epoch, slot)) for slot in range(self.batch_size))
        return max(lengths, default=0)

    def read(self, source: Source, epoch: int, slots: Sequence[int], start: int) -> Iterator[list[Sample | Failure]]:
        """Yield the samples of these slots, one list per step from step `start` on; earlier ones are not read."""
        rows = [_rows(source, self.shards(epoch, slot), start) for slot in slots]
        for _ in range(start, self.steps(epoch)):
            # Shorter slots run out before the epoch ends.
            yield [row for slot in rows if (row := next(slot, None)) is not None]


def _rows(source: Source, shards: Sequence[Shard], skip: int) -> Iterator[Sample | Failure]:
    for shard in shards:
        if skip < shard.samples:
            yield from read_shard(source, _without_first(shard, skip))
        skip = max(0, skip - shard.samples)


def _without_first(shard: Shard, skip: int) -> Shard:
    pieces = []
    for piece in shard.pieces:
        start = min(piece.start + skip, piece.stop)
        skip -= start - piece.start
        if start < piece.stop:
            pieces.append(Piece(piece.path, start, piece.stop))
    return replace(shard, pieces=tuple(pieces))
