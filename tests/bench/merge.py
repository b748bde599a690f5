"""What a merge costs at LLaVA-1.5-7B's width: `python -m tests.bench.merge [--undivided N] [--shards N ...] [--write]`.

Some shards are drawn at random (32 × 11,008 neurons, 600 concepts each, one label) and committed. A run of N shards
reads them over and over: each time with other concepts, drawn by Zipf's law from a vocabulary, with other samples and
scaled activations, so that examples change as they do in a real run. Every part is read from disk and checked; the
time that the changes take is not counted.

    undivided  merged in one process, as small runs are: CPU seconds, peak memory above that of the imports, bytes of
               parts and of tables
    ranges     merged by ranges on two workers, as runs of more than 4 GB are: CPU seconds and memory of each job, and
               of the driver
    read       `mmray rank RUN`, `mmray rank RUN CONCEPT` and `mmray neuron RUN NEURON` of the last run, each in a new
               process: seconds, CPU seconds, and how many bytes of the run it reads
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.engine import Executor, Output, Parts, Plan, executor_for, run_together
from mmray.features.census import partial_merge
from mmray.features.census.job import DECODED, CensusContext, CensusJob
from mmray.features.census.partial_merge import PartialMerge
from mmray.features.census.ranges import cut_parts, cuts_in, neuron_ranges
from mmray.features.census.reduction import candidates_kept
from mmray.features.census.settings import census_settings
from mmray.features.census.tables import PARTS, TABLES
from mmray.neuron_names import PLAIN
from mmray.neurons.concepts import NounSource
from mmray.runs import RunFolder
from mmray.runs.snapshots import SnapshotWriter, publish_tables
from mmray.runs.tables import list_column
from mmray.storage import LocalStore
from tests.bench import repeated
from tests.bench.durability import base_memory, peak_memory
from tests.bench.repeated import SAMPLES, TIMES, Repeated, RepeatedContext, Timed
from tests.bench.writing import markdown, write

WIDTHS = (11_008,) * 32
NEURONS = sum(WIDTHS)
KEPT = candidates_kept(None, NEURONS)
DRAWN, LISTED = 2, 20
"""Shards that are drawn; neurons listed per occurrence."""
EXTREMES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--undivided", type=int, default=80, help="shards to merge in one process")
    parser.add_argument("--shards", type=int, nargs="+", default=[400], help="shards to merge by ranges, in each run")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    rows, by_ranges = [], []
    with tempfile.TemporaryDirectory() as out:
        draw(Path(out))
        runs = [("merge", arguments.undivided, rows)]
        runs += [("merge_by_ranges", count, by_ranges) for count in arguments.shards]
        for kind, count, found in runs:
            # Each in a process of its own, whose memory is its own.
            code = f"from tests.bench import merge; merge.{kind}(merge.Path({out!r}), {count})"
            done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
            found += json.loads(done.stdout.splitlines()[-1])
            print(done.stdout.splitlines()[-1], flush=True)
        uri = str(Path(out) / f"ranges-{arguments.shards[-1]}")
        concept = pq.read_table(f"{uri}/tables/concepts.parquet")["concept"][-1].as_py()
        reads = [read(uri, *one) for one in (["rank", uri], ["rank", uri, concept], ["neuron", uri, "L7.u89"])]
    table = "\n".join(
        markdown(list(some[0]), [list(row.values()) for row in some]) for some in (rows, by_ranges, reads)
    )
    print(table)
    if arguments.write:
        write("tests/bench/README.md", "python -m tests.bench.merge --write", table)


def job_of(out: Path, run: str) -> CensusJob:
    return CensusJob(census_settings({"model": "demo", "data": "demo", "out": str(out / run)}))


def context_of(out: Path) -> CensusContext:
    return CensusContext(NounSource("textblob"), WIDTHS, {}, PLAIN, str(out / "decoding"))


def merge(out: Path, count: int) -> None:
    folder, job = Repeated(out, count), job_of(out, f"run-{count}")
    run = LocalStore(out / f"run-{count}")
    began, used = time.perf_counter(), time.process_time()
    with peak_memory() as peak, patch.object(partial_merge, "LARGE", 1 << 60):
        parts = TimedParts(folder, folder.receipts(), job.parts)
        headline = write_tables(run, job, Plan([], {}, context_of(out)), parts)
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    begin(run, job)
    found = {
        "shards": f"{count:,}",
        "CPU s": f"{cpu - Repeated.spent:.0f}",
        "CPU s to read and add a shard": f"{(parts.ended[0] - used - Repeated.spent) / count:.3f}",
        "CPU s to rank and write a concept": f"{(cpu + used - parts.ended[0]) / headline['concepts']:.4f}",
        "concepts": f"{headline['concepts']:,}",
        "wall s": f"{wall:.0f}",
        "memory, MB": f"{peak():.0f} + {base_memory():.0f}",
        **gigabytes(run, parts),
    }
    print(json.dumps([found]))


def begin(run: LocalStore, job: CensusJob) -> None:
    """Write what makes a run of the tables, so that it opens."""
    info = {"fingerprint": "merge", "result_settings": {}, "digests": {}, "model": {"widths": WIDTHS}}
    RunFolder(run).begin(info | {"settings": job.settings.model_dump()}, b"{}")


def gigabytes(run: LocalStore, parts: Parts) -> dict[str, str]:
    read = sum(part.size for one in parts.receipts.values() for part in (one.checksums or {}).values())
    written = sum(entry.size for entry in run.list("tables/"))
    return {"parts, GB": f"{read / 1e9:.1f}", "tables, GB": f"{written / 1e9:.2f}"}


def write_tables(run: LocalStore, job: CensusJob, plan: Plan[CensusContext], parts: Parts) -> dict[str, Any]:
    writer = SnapshotWriter(run, job.name, 1)
    headline = job.merge(plan, parts, Output(writer))
    publish_tables(run, writer.commit({"receipts": ""}, headline))
    return headline


def merge_by_ranges(out: Path, count: int, executor: Executor | None = None) -> None:
    folder, job = Repeated(out, count), job_of(out, f"ranges-{count}")
    run = LocalStore(out / f"ranges-{count}")
    plan, parts = Plan([], {}, context_of(out)), Parts(folder, folder.receipts(), job.parts)
    kinds = {kind.__name__: type(kind.__name__, (Timed, kind), {}) for kind in PartialMerge.__subclasses__()}
    with patch.multiple(partial_merge, MergeContext=RepeatedContext, LARGE=0, **kinds):
        steps = job.partial_merges(plan, parts)
        rows, walls = [], []
        executor = executor or executor_for(steps[0][0].settings.model_copy(update={"workers": "2"}))
        with executor.session():
            for step in steps:
                began = time.perf_counter()
                assert all(done.complete for done in run_together(step, executor=executor))
                # Jobs of a step run at the same time.
                walls += [f"{time.perf_counter() - began:.0f}", *["with it"] * (len(step) - 1)]
        began, used = time.perf_counter(), time.process_time()
        with peak_memory() as peak:
            headline = write_tables(run, job, plan, parts)
        wall, cpu = time.perf_counter() - began, time.process_time() - used
    for one, seconds in zip(chain(*steps), walls, strict=True):
        times = [json.loads(line) for line in Path(one.place, TIMES).read_text().splitlines()]
        rows.append(
            {
                "shards": f"{count:,}",
                "merged by ranges": one.name,
                "units": f"{len(one.units)}",
                "CPU s": f"{sum(cpu for cpu, _ in times):.0f}",
                "of the longest unit": f"{max(cpu for cpu, _ in times):.0f}",
                "wall s": seconds,
                "memory, MB": f"{max(memory for _, memory in times):.0f}",
                "concepts": "",
                "parts, GB": "",
                "tables, GB": "",
            }
        )
    driver = {"merged by ranges": "driver", "units": "1", "of the longest unit": "", "wall s": f"{wall:.0f}"}
    driver |= {"CPU s": f"{cpu:.0f}", "memory, MB": f"{peak() + base_memory():.0f}"}
    rows.append(rows[0] | driver | {"concepts": f"{headline['concepts']:,}"} | gigabytes(run, parts))
    begin(run, job)
    print(json.dumps(rows))


def read(uri: str, *arguments: str) -> dict[str, str]:
    """Return what one command costs in a new process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "mmray", *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    call = {1: "concept_table()", 2: f"rank({arguments[-1]!r})", 3: f"neuron({arguments[-1]!r})"}
    kind = call[3 if arguments[0] == "neuron" else len(arguments) - 1]
    code = f"""
import pyarrow.dataset
from mmray.runs.run import open_run
read = lambda: int(open("/proc/self/io").read().split()[1])
before = read()
open_run({uri!r}).{kind}
print(read() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    size = int(done.stdout) / 1e6
    return {"command": " ".join(["mmray", arguments[0], "RUN", *arguments[2:]]), "s": f"{wall:.1f}"} | {
        "CPU s": f"{cpu:.1f}",
        "MB read": f"{size:.2f}",
    }


@dataclass(frozen=True)
class TimedParts(Parts):
    """Notes the CPU seconds of this process when all parts are read."""

    ended: list[float] = field(default_factory=list)

    def by_unit(self, *names: Any) -> Iterator[dict[str, pa.Table]]:
        yield from super().by_unit(*names)
        self.ended.append(time.process_time())


def draw(out: Path) -> None:
    """Commit the drawn shards, and the decoding of the neurons."""
    random = np.random.default_rng(0)
    # Some neurons contribute to every noun: shards agree about them, and disagree about the rest.
    common = random.gamma(0.3, 1.0, NEURONS)
    texts = pa.array([f"tok{number}" for number in range(5_000)])
    words = pa.ListArray.from_arrays(
        np.arange(NEURONS + 1, dtype=np.int32) * 10, texts.take(pa.array(random.integers(0, 5_000, NEURONS * 10)))
    )
    with patch("os.fsync", lambda _: None):
        decoded = {DECODED: pa.table({"tokens": words, "suppressed": words}), "errors": TABLES["errors"].empty_table()}
        RunFolder(LocalStore(out / "decoding")).commit_shard(0, decoded, 0, 0.0)
        folder = RunFolder(LocalStore(out / "drawn"))
        for number in range(DRAWN):
            first = folder.receipt(0)
            cuts = cuts_in(first) if first else []
            tables = cut_parts(shard_tables(random, common), len(neuron_ranges([WIDTHS])), cuts)
            folder.commit_shard(number, tables, SAMPLES, 1.0)


def shard_tables(random: np.random.Generator, common: np.ndarray) -> dict[str, pa.Table]:
    """Return the parts of a shard: many concepts occur once, and few often."""
    counts = np.minimum(random.zipf(1.9, repeated.CONCEPTS), 50)
    kept, scores, lowest = [], [], []
    leading = np.argsort(-common)[: KEPT // 2]
    for count in counts:
        candidates = np.unique(np.concatenate([leading, random.integers(0, NEURONS, KEPT)]))
        highest = np.sort(random.permutation(candidates)[:KEPT])
        values = (common[highest] + random.gamma(2.0, 1.0, KEPT)).astype(np.float32) * float(count)
        kept.append(highest)
        scores.append(values)
        lowest.append((values.min(), -values.max()))
    score, schema = np.stack(scores), PARTS["concepts"]
    names = pa.array([f"{number:04d}" for number in range(repeated.CONCEPTS)])
    bounds = np.array(lowest)
    index = list_column(np.stack(kept), schema.field("neuron").type)
    concepts = [
        names,
        pa.array(counts),
        pa.array(bounds[:, 0]),
        pa.array(bounds[:, 1]),
        index,
        list_column(score, schema.field("score").type),
        list_column((score**2 / counts[:, None])[counts > 1], schema.field("score_squares").type, counts > 1),
        list_column(random.normal(size=score.shape), schema.field("activation").type),
    ]
    rows = np.repeat(np.arange(repeated.CONCEPTS), counts)
    listed = random.integers(0, NEURONS, len(rows) * LISTED)
    entries = pa.StructArray.from_arrays(
        [
            pa.array((listed // WIDTHS[0]).astype(np.int16)),
            pa.array((listed % WIDTHS[0]).astype(np.int32)),
            *(pa.array(random.normal(size=len(listed)).astype(np.float32)) for _ in range(2)),
        ],
        ["layer", "unit", "score", "activation"],
    )
    occurrences = {
        "sample_id": pa.array(["x"] * len(rows)),
        "concept": pa.array(["x"] * len(rows)),
        "token": pa.array(["x"] * len(rows)),
        # Here the row of the concept, and the row of the sample; `Repeated` makes names of them.
        "token_id": rows,
        "position": random.integers(0, SAMPLES, len(rows)),
        "log_prob": random.normal(size=len(rows)),
        "neurons": pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * LISTED, entries),
    }
    return {
        "captions": pa.Table.from_pylist(
            [
                {
                    "sample_id": "x",
                    "caption": f"A caption of {row} that is about as long as they are in COCO.",
                    "source": "dataset",
                }
                | {"language": "en", "shard_id": 0, "image": "x", "labels": []}
                for row in range(SAMPLES)
            ],
            schema=PARTS["captions"],
        ),
        "occurrences": pa.table(occurrences, schema=PARTS["occurrences"]),
        "errors": PARTS["errors"].empty_table(),
        "concepts": pa.Table.from_arrays(concepts, schema=schema),
        "totals": totals_table(int(counts.sum()), common),
        **statistics_tables(random),
    }


def totals_table(n: int, common: np.ndarray) -> pa.Table:
    schema = PARTS["totals"]
    sums = [list_column(values[None], schema.field("score").type) for values in (common * n, (common**2 + 4) * n)]
    return pa.Table.from_arrays([pa.array([n]), *sums], schema=schema)


def statistics_tables(random: np.random.Generator) -> dict[str, pa.Table]:
    """Return the parts with the neurons' activity, of one label, and their extreme samples."""
    activity, examples = PARTS["activity"], PARTS["examples"]
    ranks = [(sign, rank) for sign in (1, -1) for rank in range(1, EXTREMES + 1)]
    values = -np.sort(-random.gumbel(size=(2, EXTREMES, NEURONS)), axis=1) + 3
    extremes = (values * np.array([1, -1])[:, None, None]).reshape(-1, NEURONS)
    places = random.integers(0, SAMPLES, (len(ranks), NEURONS))

    def column(schema: pa.Schema, name: str, rows: np.ndarray) -> pa.ListArray:
        return list_column(rows, schema.field(name).type)

    return {
        "activity": pa.table(
            {
                "label_kind": ["all"] * 2,
                "label": ["all"] * 2,
                "modality": ["image", "text"],
                "n_tokens": [64 * SAMPLES, 12 * SAMPLES],
                "n_active": column(activity, "n_active", random.integers(0, 3_000, (2, NEURONS))),
                "sum": column(activity, "sum", random.normal(size=(2, NEURONS))),
                "sum_squares": column(activity, "sum_squares", random.gamma(1, size=(2, NEURONS))),
                "module": ["language"] * 2,
            },
            schema=activity,
        ),
        "examples": pa.table(
            {
                "sign": pa.array([sign for sign, _ in ranks], pa.int8()),
                "rank": pa.array([rank for _, rank in ranks], pa.int16()),
                "sample": column(examples, "sample", places),
                "position": column(examples, "position", places),
                "activation": column(examples, "activation", extremes),
            },
            schema=examples,
        ),
    }


if __name__ == "__main__":
    main()
