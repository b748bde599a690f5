"""Census against a plain forward, side by side: `python -m tests.bench.census [--shards 3] [--rounds 3]`.

Both run the demo model (or --model, --data) over the same samples on the same cores or GPU, in turns, so that a noisy
machine disturbs both alike. The plain forward is `model(**inputs)` under inference mode over the census's own batches,
prepared in memory; the census starts from encoded images and does everything up to the committed parts: decode,
tokenise, forward, score, reduce, write. As in an actor, a thread finishes and commits a shard while the next one runs;
only the last of --shards is finished alone. Start-up (model loading) is excluded from both. The census asks the model
for no logits but those of the concepts and for no cache; the second row is a plain forward that does without them too.

Without a GPU there is a worker per core, with one thread, as in a census; `--workers` says how many. Rates are of all
workers together. On a machine that does other work too, CPU time says more.

`python -m tests.bench.census captions [--images 192]` compares captions of one image in one row with a row each: the
demo's scenes with five captions each, as COCO JSON, from encoded images to committed parts, in turns.

`python -m tests.bench.census plan` compares what `mmray plan` says, by arithmetic and by `--measure`, with what a
census in this process then takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.engine.clock import timed_phases
from mmray.features.census.inputs import open_data
from mmray.features.census.job import run_census
from mmray.features.census.planning import plan_census
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.models.loading import load
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import noun_source
from mmray.neurons.row_sharing import RowSharing
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from tests.support.coco_like import CAPTIONS, coco_like


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("forward", "captions", "plan"), default="forward")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--samples", type=int, default=500, help="of a shard")
    parser.add_argument("--shards", type=int, default=3, help="of the part forward")
    parser.add_argument("--images", type=int, default=192, help="of the part captions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    cores = [None] if torch.cuda.is_available() else sorted(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=len(cores), help="of the part forward")
    arguments = parser.parse_args()
    if arguments.part == "forward":
        with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
            show(list(pool.map(partial(run, arguments), cores[: arguments.workers])))
        return
    confine(cores[0])
    with tempfile.TemporaryDirectory() as out:
        {"captions": captions, "plan": plan}[arguments.part](arguments, out)


def confine(core: int | None) -> None:
    """Give this process one core and one thread, if there is no GPU."""
    if core is not None:
        os.sched_setaffinity(0, [core])
        torch.set_num_threads(1)


def plan(arguments: argparse.Namespace, out: str) -> None:
    """Print what a plan says next to what then happened."""
    given = {name: getattr(arguments, name) for name in ("model", "data", "batch_size")}
    settings = census_settings({**given, "limit": arguments.samples, "out": f"{out}/run", "local": True})
    guess, measured = plan_census(settings), plan_census(settings, measure=True)
    run_census(settings)
    happened = open_run(settings.out).status()
    written = sum(file.stat().st_size for file in Path(settings.out).rglob("*") if file.is_file())
    print(f"{'':32s}{'planned':>10s}{'happened':>10s}{'planned / happened':>20s}")
    for name, planned, found in (
        ("worker seconds, by arithmetic", 3600 * guess.worker_hours, happened.cost.seconds),
        ("worker seconds, --measure", 3600 * measured.worker_hours, happened.cost.seconds),
        ("MB written", guess.bytes_written / 1e6, written / 1e6),
    ):
        print(f"{name:32s}{planned:10.1f}{found:10.1f}{planned / found:20.2f}")


def captions(arguments: argparse.Namespace, out: str) -> None:
    """Print captions per second in shared rows and in rows apart, where the time goes, and how scores differ."""
    written = coco_like(Path(out), images=arguments.images, held_out=1)
    settings = census_settings(
        {"model": arguments.model, "data": str(written.train), "out": out, "batch_size": arguments.batch_size}
    )
    model, source = load(settings.model), open_data(settings)
    samples = arguments.images * CAPTIONS
    shard = cut(source.files(), samples, samples).shards[0]
    nouns = noun_source(settings.nouns, source.objects_vocabulary(), source.translations())
    folder, ways = RunFolder.at(f"{out}/run"), {"shared": RowSharing(model), "apart": None}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    phases: dict[str, dict[str, float]] = {}
    tables: dict[str, dict[str, pa.Table]] = {}
    for number in range(-1, arguments.rounds):
        for name, sharing in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            with timed_phases() as spent:
                tables[name] = ShardAnalysis(model, settings, nouns, number + 1, sharing).run(read_shard(source, shard))
                folder.commit_shard(2 * (number + 1) + (name == "apart"), tables[name], samples, 0.0)
            if number >= 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - began, time.process_time() - cpu))
                phases[name] = spent
    print(f"{'':8s}{'captions/s':>12s}{'per CPU s':>12s}   last round")
    for name, times in seconds.items():
        wall, busy = (samples / statistics.median(column) for column in zip(*times, strict=True))
        shares = ", ".join(f"{phase} {spent:.2f} s" for phase, spent in phases[name].items())
        print(f"{name:8s}{wall:12.1f}{busy:12.1f}   {shares}")
    for what, column in (("wall", 0), ("CPU", 1)):
        ratios = sorted(apart[column] / shared[column] for shared, apart in zip(*seconds.values(), strict=True))
        print(f"apart / shared, {what} time: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    one, other = (part["totals"]["score"].combine_chunks().flatten().to_numpy() for part in tables.values())
    print(f"a neuron's sum of scores differs by at most {abs(one - other).max() / abs(other).max():.1e} of the highest")


@dataclass(frozen=True)
class Measured:
    """What a worker measured: seconds of wall and of CPU time per round, in the order of NAMES, and memory in GB."""

    samples: int
    rounds: list[list[tuple[float, float]]]
    memory: tuple[float, float, float]


NAMES = ("plain forward", "forward without logits", "census")


def run(arguments: argparse.Namespace, core: int | None) -> Measured:
    """Measure one worker."""
    confine(core)
    with tempfile.TemporaryDirectory() as out:
        return measured(arguments, out)


def measured(arguments: argparse.Namespace, out: str) -> Measured:
    settings = census_settings(
        {"model": arguments.model, "data": arguments.data, "out": out, "batch_size": arguments.batch_size}
    )
    before = memory()
    model = load(settings.model)
    loaded = memory()
    source = open_data(settings)
    shards = cut(source.files(), arguments.samples, arguments.samples * arguments.shards).shards
    nouns = noun_source(settings.nouns, source.objects_vocabulary(), source.translations())
    folder = RunFolder.at(out)

    def commit(analysis: ShardAnalysis, number: int) -> None:
        folder.commit_shard(number, analysis.tables(), arguments.samples, 0.0)

    def census(number: int) -> tuple[float, float]:
        began, busy = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(1) as finishing:
            finished = []
            for shard in shards:
                analysis = ShardAnalysis(model, settings, nouns, shard.shard_id)
                analysis.collect(read_shard(source, shard))
                finished.append(finishing.submit(commit, analysis, number * len(shards) + shard.shard_id))
            for each in finished:
                each.result()
        return time.perf_counter() - began, time.process_time() - busy

    # The batches of the census: over all shards together they would be sorted better, and padded less.
    samples = [[row for row in read_shard(source, shard) if isinstance(row, Sample)] for shard in shards]
    prepared = [batch for own in samples for _, batch in ShardAnalysis(model, settings, nouns, 0).encoded(own)]

    def timed(step: Callable[[Batch], object]) -> tuple[float, float]:
        began, busy = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for batch in prepared:
                step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began, time.process_time() - busy

    def plain(batch: Batch) -> None:
        model.network(**batch.to(model.device, model.network.dtype))

    def bare(batch: Batch) -> None:
        forward(model, batch)

    timed(plain), census(0)  # warm up
    rounds = [[timed(plain), timed(bare), census(number)] for number in range(1, arguments.rounds + 1)]
    return Measured(sum(map(len, samples)), rounds, (before, loaded, memory()))


def memory() -> float:
    """Return the process's peak memory in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(workers: list[Measured]) -> None:
    """Print the rates of all workers together, and their ratios."""
    samples = sum(one.samples for one in workers)
    walls, cpus = [], []
    for rounds in zip(*(one.rounds for one in workers), strict=True):
        kinds = [list(zip(*each, strict=True)) for each in zip(*rounds, strict=True)]
        walls.append([sum(one.samples / wall for one, wall in zip(workers, each[0], strict=True)) for each in kinds])
        cpus.append([samples / sum(each[1]) for each in kinds])
    print(f"{'':26s}{'samples/s':>10s}{'per CPU s':>10s}   census / it (median, range), by wall time and by CPU time")
    for kind, name in enumerate(NAMES):
        line = f"{name:26s}"
        for rates in (walls, cpus):
            line += f"{statistics.median(row[kind] for row in rates):10.1f}"
        for rates in (walls, cpus):
            ratios = sorted(row[-1] / row[kind] for row in rates)
            line += f"   {statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(line)
    before, loaded, peak = (max(each) for each in zip(*(one.memory for one in workers), strict=True))
    print(f"{len(workers)} workers; peak memory {peak:.2f} GB; before the model {before:.2f}, with it {loaded:.2f}")


if __name__ == "__main__":
    main()
