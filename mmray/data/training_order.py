"""Data in the order of a training: steps of one sample a lane, which any number of workers can share.

    step      0   1   2  …
    lane 0    a   b   c  …     the shards of an epoch, drawn in another order each, one after the other
    lane 1    k   l   m  …     a worker has lanes of its own, and reads their shards alone
    …

What a step holds depends on the seed alone, not on the number of workers, nor on whether the training was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest, Piece, Shard, cut, read_shard
from mmray.data.source import DataFile, Source


def cut_for_training(files: Sequence[DataFile], lanes: int, shard_size: int, limit: int | None = None) -> Manifest:
    """Return shards of at most `shard_size` samples, as many for every lane as far as they go."""
    samples = sum(file.rows for file in files)
    samples = samples if limit is None else min(samples, limit)
    shards = ceil(samples / (shard_size * lanes)) * lanes
    return cut(files, max(1, ceil(samples / max(shards, 1))), limit)


@dataclass(frozen=True)
class TrainingOrder:
    """The order in which a training goes through the shards of its data."""

    manifest: Manifest
    count: int
    """Lanes: samples a step, all workers together."""
    seed: int

    def shards(self, epoch: int, lane: int) -> list[Shard]:
        """Return the shards of a lane in an epoch."""
        order = list(self.manifest.shards)
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order[lane :: self.count]

    def steps(self, epoch: int) -> int:
        """Return the steps of an epoch: the samples of its longest lane. Every sample comes once."""
        lengths = (sum(shard.samples for shard in self.shards(epoch, lane)) for lane in range(self.count))
        return max(lengths, default=0)

    def read(self, source: Source, epoch: int, lanes: Sequence[int], start: int) -> Iterator[list[Sample | Failure]]:
        """Yield the samples of these lanes, a list a step from step `start` on; what is before it is not read."""
        rows = [_rows(source, self.shards(epoch, lane), start) for lane in lanes]
        for _ in range(start, self.steps(epoch)):
            yield [row for lane in rows if (row := next(lane, None)) is not None]


def _rows(source: Source, shards: Sequence[Shard], skipped: int) -> Iterator[Sample | Failure]:
    for shard in shards:
        if skipped < shard.samples:
            yield from read_shard(source, _behind(shard, skipped))
        skipped = max(0, skipped - shard.samples)


def _behind(shard: Shard, skipped: int) -> Shard:
    """Return the shard without its first samples."""
    pieces = []
    for piece in shard.pieces:
        start = min(piece.start + skipped, piece.stop)
        skipped -= start - piece.start
        if start < piece.stop:
            pieces.append(Piece(piece.path, start, piece.stop))
    return replace(shard, pieces=tuple(pieces))
