"""What durability costs: `python -m tests.bench.durability [overhead|merge] [--shards N]`.

overhead  the demo's census of one shard of 500 samples: the part of its time that goes into counting the attempt,
          writing the parts and committing the receipt (Parquet, fsync, hard links), over some rounds
merge     a run of N shards with simulated parts (demo-like captions, two layers of 64 neurons) listed and merged on
          the local disk: seconds, and the driver's memory
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from mmray.engine import Output, Parts, Plan
from mmray.features.census.job import DECODED, CensusContext, CensusJob
from mmray.features.census.settings import census_settings
from mmray.features.census.tables import PARTS, SUMS, TABLES
from mmray.neuron_names import PLAIN
from mmray.neurons.concepts import NounSource
from mmray.runs import RunFolder
from mmray.runs.snapshots import SnapshotWriter
from mmray.runs.tables import list_column
from mmray.storage import LocalStore

WIDTHS = (64, 64)
SAMPLES = 8
"""Samples of a simulated shard."""
CONCEPTS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["overhead", "merge"])
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as out:
        if arguments.what == "overhead":
            overhead(Path(out), arguments.rounds)
            return
        for count in arguments.shards:
            # Each in a process of its own, whose memory is its own.
            code = f"from tests.bench import durability; durability.merge(durability.Path({out!r}), {count})"
            subprocess.run([sys.executable, "-c", code], check=True)


def overhead(out: Path, rounds: int) -> None:
    import torch

    from mmray.data.shards import cut, read_shard
    from mmray.features.census.inputs import open_data
    from mmray.features.census.shard import ShardAnalysis
    from mmray.models.loading import load
    from mmray.neurons.concepts import noun_source

    # As a census on a machine without GPUs has it by default: workers of one thread.
    torch.set_num_threads(1)
    settings = census_settings({"model": "demo", "data": "demo", "out": str(out / "run")})
    model, source = load(settings.model), open_data(settings)
    shard = cut(source.files(), 500, 500).shards[0]
    nouns = noun_source(settings.nouns, source.objects_vocabulary(), source.translations())
    folder = RunFolder(LocalStore(out / "run"))
    parts: list[tuple[float, float, int]] = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        folder.attempt(number)
        counted = time.perf_counter() - began
        tables = ShardAnalysis(model, settings, nouns, number).run(read_shard(source, shard))
        analysed = time.perf_counter()
        receipt = folder.commit_shard(number, tables, shard.samples, analysed - began)
        ended = time.perf_counter()
        size = sum(folder.store.entry(key).size for key in receipt.parts.values())  # type: ignore[union-attr]
        if number:  # the first one warms up
            parts.append((counted + ended - analysed, ended - began, size))
    shares = sorted(durable / whole for durable, whole, _ in parts)
    print(
        f"durability {statistics.median(shares):.2%} of a shard's time ({shares[0]:.2%} to {shares[-1]:.2%}): "
        f"{statistics.median(p[0] for p in parts):.2f} of {statistics.median(p[1] for p in parts):.1f} s, "
        f"{parts[0][2] / 1e6:.0f} MB"
    )


def merge(out: Path, count: int) -> None:
    folder = RunFolder(LocalStore(out / f"merge-{count}"))
    simulate(folder, count)
    began = time.perf_counter()
    with peak_memory() as peak:
        receipts = folder.receipts()
        listed = time.perf_counter() - began
        job = CensusJob(census_settings({"model": "demo", "data": "demo", "out": str(out)}))
        context = CensusContext(NounSource("textblob"), WIDTHS, {}, PLAIN, f"{folder.store.uri}/decoding")
        writer = SnapshotWriter(folder.store, job.name, 1)
        job.merge(Plan([], {}, context), Parts(folder, receipts, job.parts), Output(writer))
        writer.commit({}, {})
    took = time.perf_counter() - began
    assert len(receipts) == count
    size = sum(entry.size for entry in folder.store.list("shards/"))
    print(
        f"{count:6d} shards: listed in {listed:.1f} s, listed and merged in {took:.1f} s, "
        f"memory {peak():+.0f} MB above {base_memory():.0f}; {size / 1e6:.0f} MB of parts"
    )


def simulate(folder: RunFolder, count: int) -> None:
    """Write a run of so many shards with random parts."""
    writes: Any = patch("os.fsync", lambda _: None)  # what is measured is the reading
    random = np.random.default_rng(0)
    neurons = sum(WIDTHS)
    words = pa.array([["a"]] * neurons, pa.list_(pa.string()))
    with writes, ThreadPoolExecutor(4) as pool:
        decoding = RunFolder(LocalStore(Path(folder.store.uri) / "decoding"))
        decoded = {DECODED: pa.table({"tokens": words, "suppressed": words}), "errors": TABLES["errors"].empty_table()}
        decoding.commit_shard(0, decoded, 0, 0.0)
        kinds = [shard_tables(number, random) for number in range(min(count, 16))]
        list(pool.map(lambda number: folder.commit_shard(number, kinds[number % 16], SAMPLES, 1.0), range(count)))


def shard_tables(number: int, random: np.random.Generator) -> dict[str, pa.Table]:
    """Return random parts of a shard."""
    neurons = sum(WIDTHS)
    names = [f"concept-{index}" for index in random.choice(CONCEPTS, SAMPLES)]
    samples = [f"sample-{number}-{index}" for index in range(SAMPLES)]
    best = [
        [
            {"layer": int(index // 64), "unit": int(index % 64), "score": 1.0, "activation": 1.0}
            for index in random.choice(neurons, 20, replace=False)
        ]
        for _ in names
    ]
    distinct = sorted(set(names))
    schema = PARTS["concepts"]

    def lists(kind: pa.DataType, rows: int) -> pa.ListArray:
        return list_column(random.normal(size=(rows, neurons)), kind)

    def column(name: str, part: str, rows: int) -> pa.ListArray:
        return lists(PARTS[part].field(name).type, rows)

    concepts = [
        pa.array(distinct),
        pa.array([names.count(name) for name in distinct], pa.int64()),
        pa.array([-np.inf] * len(distinct)),
        pa.array([np.inf] * len(distinct)),
        pa.nulls(len(distinct), schema.field("neuron").type),
        *(column(name, "concepts", len(distinct)) for name in SUMS),
    ]
    activity = {"label_kind": ["all"] * 2, "label": ["all"] * 2, "modality": ["image", "text"], "n_tokens": [9, 9]}
    activity["module"] = ["language"] * 2
    sums = {name: column(name, "activity", 2) for name in ("n_active", "sum", "sum_squares")}
    ranks = [(sign, rank) for sign in (1, -1) for rank in range(1, 6)]
    picks = list_column(random.integers(0, SAMPLES, (10, neurons)), PARTS["examples"].field("sample").type)
    examples = {
        "sign": pa.array([sign for sign, _ in ranks], pa.int8()),
        "rank": pa.array([rank for _, rank in ranks], pa.int16()),
        "sample": picks,
        "position": picks,
        "activation": column("activation", "examples", 10),
    }
    caption = "An image of a dog, a cat, a teapot and a guitar."
    return {
        "captions": pa.Table.from_pylist(
            [
                {"sample_id": name, "caption": caption, "source": "dataset", "language": "en", "shard_id": number}
                for name in samples
            ],
            schema=PARTS["captions"],
        ),
        "occurrences": pa.Table.from_pylist(
            [
                {"sample_id": sample, "concept": name, "token": "x", "token_id": 1, "position": 1, "neurons": listed}
                for sample, name, listed in zip(samples, names, best, strict=True)
            ],
            schema=PARTS["occurrences"],
        ),
        "errors": PARTS["errors"].empty_table(),
        "concepts": pa.Table.from_arrays(concepts, schema=schema),
        "totals": pa.Table.from_arrays(
            [pa.array([SAMPLES], pa.int64()), column("score", "totals", 1), column("score_squares", "totals", 1)],
            schema=PARTS["totals"],
        ),
        "activity": pa.table(activity | sums, schema=PARTS["activity"]),
        "examples": pa.table(examples, schema=PARTS["examples"]),
    }


def memory() -> float:
    """Return this process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


_base = [0.0]


def base_memory() -> float:
    """Return the memory before the last measurement began."""
    return _base[0]


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Yield what tells, after the block, how far memory rose within it at most."""
    _base[0] = most = memory()
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.02):
            most = max(most, memory())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield lambda: most - _base[0]
    finally:
        most = max(most, memory())
        stop.set()
        watching.join()


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
