"""Census against a plain forward, side by side: `python -m tests.bench.census [--samples 500] [--rounds 5]`.

Both run the demo model (or --model, --data) over the same samples on the same cores or GPU, in turns, so that a noisy
machine disturbs both alike. The plain forward is `model(**inputs)` under inference mode, with its inputs prepared in
memory; the census starts from encoded images and does everything up to the committed parts: decode, tokenise, forward,
score, reduce, write. Start-up (model loading) is excluded from both. The census asks the model for no logits but those
of the concepts and for no cache; the second row is a plain forward that does without them too.

All cores by default; `--cores 1` confines both to one, which is what a census without GPUs gives each of its workers
where it has as many workers as cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.features.census.inputs import open_data
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.models.loading import load
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward
from mmray.neurons.concepts import noun_source
from mmray.runs import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int)
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        torch.set_num_threads(arguments.cores)
    with tempfile.TemporaryDirectory() as out:
        run(arguments, out)


def run(arguments: argparse.Namespace, out: str) -> None:
    settings = census_settings(
        {"model": arguments.model, "data": arguments.data, "out": out, "batch_size": arguments.batch_size}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load(settings.model)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_data(settings)
    manifest = cut(source.files(), arguments.samples, arguments.samples)
    nouns = noun_source(settings.nouns, source.objects_vocabulary(), source.translations())
    folder = RunFolder.at(out)

    def census(number: int) -> float:
        began = time.perf_counter()
        tables = ShardAnalysis(model, settings, nouns, number).run(read_shard(source, manifest.shards[0]))
        folder.commit_shard(number, tables, manifest.samples, 0.0)
        return time.perf_counter() - began

    samples = [row for row in read_shard(source, manifest.shards[0]) if isinstance(row, Sample)]
    prepared = [batch for _, batch in ShardAnalysis(model, settings, nouns, 0).encoded(samples)]

    def timed(step: Callable[[Batch], object]) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in prepared:
                step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def plain(batch: Batch) -> None:
        model.network(**batch.to(model.device, model.network.dtype))

    def bare(batch: Batch) -> None:
        forward(model, batch)

    timed(plain), census(0)  # warm up
    rounds = [(timed(plain), census(number), timed(bare)) for number in range(1, arguments.rounds + 1)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{'':26s}{'samples/s':>10s}   census / it (median, range)")
    for name, column in (("plain forward", 0), ("forward without logits", 2), ("census", 1)):
        speed = len(samples) / statistics.median(times[column] for times in rounds)
        ratios = sorted(times[column] / times[1] for times in rounds)
        print(f"{name:26s}{speed:10.1f}   {statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    print(f"peak memory {peak / 2**20:.2f} GB; before the model {before / 2**20:.2f}, with it {loaded / 2**20:.2f}")


if __name__ == "__main__":
    main()
