"""Census against a plain forward, side by side: `python -m tests.bench.census [--samples 500] [--rounds 3]`.

Both run the demo model (or --model, --data) over the same samples on the same cores or GPU, in turns, so that a noisy
machine disturbs both alike. The plain forward gets its inputs prepared in memory; the census starts from encoded
images and does everything up to the committed parts: decode, tokenise, forward, score, reduce, write. Start-up (model
loading) is excluded from both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time

import torch

from mmray.cluster.worker import open_data
from mmray.datasets.samples import Sample
from mmray.datasets.shards import cut, read_shard
from mmray.models.loading import load
from mmray.neurons.concepts import noun_source
from mmray.neurons.scoring import forward
from mmray.neurons.shard import ShardAnalysis
from mmray.runs import RunFolder
from mmray.settings import census_settings
from mmray.storage import open_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
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
    folder = RunFolder(open_store(out))

    def census(number: int) -> float:
        began = time.perf_counter()
        tables = ShardAnalysis(model, settings, nouns, number).run(read_shard(source, manifest.shards[0]))
        folder.commit_shard(number, tables, manifest.samples, 0.0)
        return time.perf_counter() - began

    samples = [row for row in read_shard(source, manifest.shards[0]) if isinstance(row, Sample)]
    prepared = [batch for _, batch in ShardAnalysis(model, settings, nouns, 0).encoded(samples)]

    @torch.inference_mode()
    def plain() -> float:
        began = time.perf_counter()
        for batch in prepared:
            forward(model, batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    census(0), plain()  # warm up
    pairs = [(plain(), census(number)) for number in range(1, arguments.rounds + 1)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = len(samples)
    print(f"{'':24s}{'samples/s':>12s}")
    print(f"{'plain forward':24s}{count / statistics.median(p for p, _ in pairs):12.1f}")
    print(f"{'census':24s}{count / statistics.median(c for _, c in pairs):12.1f}")
    ratios = [p / c for p, c in pairs]
    print(f"{'ratio':24s}{statistics.median(ratios):12.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"peak memory {peak / 2**20:.2f} GB; before the model {before / 2**20:.2f}, with it {loaded / 2**20:.2f}")


if __name__ == "__main__":
    main()
