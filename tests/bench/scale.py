"""How a census grows with data and replicas, simulated from measured phases: `python -m tests.bench.scale [--write]`.

Replicas take shards from one driver, commit them to S3, and are lost now and then, as spot machines are: a lost shard
is done again, and the replica comes back later. The driver answers for one shard at a time. Then replicas merge ranges
(`Merge`). What a phase takes was measured by other benchmarks (`Phases`); requests to storage are counted here, on a
job that really runs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from mmray.engine import LocalExecutor
from mmray.features.census.bytes_written import PER_NEURON
from mmray.features.census.ranges import MOST, neuron_ranges
from mmray.features.census.settings import MOST_PER_SHARD
from mmray.features.census.tables import PARTS
from mmray.runs import folder
from mmray.storage import Store, open_store
from tests.bench.engine import measure
from tests.bench.writing import markdown, write
from tests.support.stores import Wrapped

CAPTIONS, REPLICAS = (10**6, 10**9), (8, 64, 256, 1024)


WIDTHS = (11_008,) * 32


@dataclass(frozen=True)
class Merge:
    """A job of the merge, and among how many replicas it can be divided."""

    per_shard: float
    """Seconds of one core."""
    units: int

    def seconds(self, shards: int, replicas: int) -> float:
        return shards * self.per_shard / min(replicas, self.units, shards)


RANGES = len(neuron_ranges([WIDTHS]))
LARGER = 5
"""Times the concepts and occurrences of a shard of `tests.bench.merge` that one of the default size has."""
MERGES = (
    Merge(LARGER * 0.015, sys.maxsize),
    Merge(0.09, RANGES),
    # To read a shard's concepts, and to rank them in 2,000 shards, where a concept has 60 rows.
    Merge(LARGER * (0.075 + 600 / 60 * 0.007), MOST),
)
"""Jobs `rows`, `sums` and `rankings` (`tests.bench.merge`). The other one, and the driver, grow with the vocabulary."""


@dataclass(frozen=True)
class Phases:
    """What LLaVA-1.5-7B's census takes on A100s; times are in seconds."""

    forward: float = 1.88 / (0.6 * 312)
    """Per caption: the arithmetic and speed of `mmray plan` on COCO's validation captions."""
    captions: int = MOST_PER_SHARD
    """Per shard."""
    parts: float = 16e3
    """Bytes per caption in a shard of the default size (`tests.bench.size`)."""
    upload: float = 100e6
    """Bytes per second that a replica sends to S3."""
    driver: float = 1.1e-3
    """The driver's time per shard on Ray (`tests.bench.engine --ray`)."""
    merges: tuple[Merge, ...] = MERGES
    tables: float = 21
    """Of one core, to regroup the rankings of 20,000 concepts by neuron, and to copy all tables; from there, too."""
    life: float = 6 * 3600
    """Mean life of a replica, and how long until there is another, which has loaded the model."""
    absence: float = 360
    put_limit: float = 3500
    """Writes per second that S3 takes under one prefix."""


@dataclass(frozen=True)
class Outcome:
    """What a simulated census took; times are in seconds."""

    shards: int
    seconds: float
    """From the first shard to the last commit of one."""
    driver: float
    """Fraction of this time that the driver was busy."""
    lost: int
    """Shards that were done again."""
    merge: float
    """The same for what merges."""
    alone: float
    """What the merge takes on one core."""


def simulate(captions: int, replicas: int, phases: Phases, seed: int = 0) -> Outcome:
    """Run the shards through the replicas and the driver."""
    generator = random.Random(seed)
    shards = ceil(captions / phases.captions)
    work = phases.captions * (phases.forward + phases.parts / phases.upload)
    # Of each replica: when it comes back with an answer, whether with a shard, and when it is lost.
    answers: list[tuple[float, int, bool, float]] = []

    def next_answer(now: float, replica: int, ends: float) -> tuple[float, int, bool, float]:
        done = now + work * generator.uniform(0.9, 1.1)
        if done <= ends:
            return done, replica, True, ends
        back = ends + phases.absence
        return back, replica, False, back + generator.expovariate(1 / phases.life)

    for replica in range(min(replicas, shards)):
        answers.append(next_answer(0.0, replica, generator.expovariate(1 / phases.life)))
    heapify(answers)
    done = lost = 0
    free = busy = 0.0
    while True:
        now, replica, committed, ends = answers[0]
        done, lost = done + committed, lost + (not committed)
        free = max(now, free) + phases.driver
        busy += phases.driver
        if done == shards:
            merge, alone = (
                sum(one.seconds(shards, many) for one in phases.merges) + phases.tables for many in (replicas, 1)
            )
            return Outcome(shards, free, busy / free, lost, merge, alone)
        heapreplace(answers, next_answer(free, replica, ends))


class Counted(Wrapped):
    """Counts the requests that change storage, and those that read."""

    requests: ClassVar[Counter[str]] = Counter()

    def commit(self, key: str, data: bytes) -> bool:
        self.requests["write"] += 1
        return super().commit(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.requests["write"] += 1
        super().put(key, data)

    def delete(self, key: str) -> None:
        self.requests["write"] += 1
        super().delete(key)

    def read(self, key: str) -> bytes:
        self.requests["read"] += 1
        return super().read(key)


def requests_per_unit(units: int = 200) -> dict[str, float]:
    """Return the requests of a unit with as many parts as a shard of a census, by kind."""
    Counted.requests.clear()

    def counted(uri: str | Path) -> Store:
        return Counted(open_store(uri))

    with tempfile.TemporaryDirectory() as out, patch.object(folder, "open_store", counted):
        measure(out, units, LocalExecutor())
    # The job that is counted has one part and `errors`, and its merge reads the part; a census writes no other alone.
    more = RANGES * len(PER_NEURON) + MOST + len({*PARTS} - {*PER_NEURON, "concepts", "decoded"}) - 2
    return {kind: count / units + more for kind, count in Counted.requests.items()}


def limits(outcome: Outcome, phases: Phases, requests: float) -> dict[str, float]:
    """Return how close to its limit each common resource is: 1 is the limit, or as long as the census itself."""
    return {
        "driver": outcome.driver,
        "writes to S3": outcome.shards * requests / outcome.seconds / phases.put_limit,
        "merge": outcome.merge / outcome.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into the README of the benchmarks")
    arguments = parser.parse_args()
    phases, requests = Phases(), requests_per_unit()
    columns: dict[str, Callable[[int, int, Outcome], Any]] = {
        "captions": lambda captions, _, __: f"{captions:,}",
        "replicas": lambda _, replicas, __: f"{replicas:,}",
        "shards": lambda _, __, done: f"{done.shards:,}",
        "census": lambda _, __, done: hours(done.seconds),
        "of ideal": lambda captions, replicas, done: f"{captions * phases.forward / replicas / done.seconds:.2f}",
        "lost shards": lambda _, __, done: f"{done.lost:,}",
        "driver busy": lambda _, __, done: f"{done.driver:.1%}",
        "writes to S3 per s": lambda _, __, done: f"{done.shards * requests['write'] / done.seconds:,.1f}",
        "TB": lambda captions, _, __: f"{captions * phases.parts / 1e12:.3g}",
        "merge": lambda _, __, done: hours(done.merge),
        "merge, one core": lambda _, __, done: hours(done.alone),
        "nearest limit": lambda _, __, done: nearest(limits(done, phases, requests["write"])),
    }
    rows = []
    for captions in CAPTIONS:
        for replicas in REPLICAS:
            done = simulate(captions, replicas, phases)
            rows.append([show(captions, replicas, done) for show in columns.values()])
    table = markdown(list(columns), rows)
    print(table, *(f"{kind}s per shard: {count:.1f}" for kind, count in requests.items()), sep="\n")
    if arguments.write:
        write("tests/bench/README.md", "python -m tests.bench.scale --write", table)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def nearest(found: dict[str, float]) -> str:
    name = max(found, key=found.__getitem__)
    return f"{name} ({found[name]:.2g})"


if __name__ == "__main__":
    main()
