"""A census at the size of LLaVA-1.5-7B, next to a plain forward: `python -m tests.bench.size [--cores 1] [--write]`.

The model has random weights, 32 layers of 11,008 MLP neurons, hidden size 64, and the demo's vocabulary and 64 image
tokens, so that it runs on a CPU. `--shape llava-1.5-7b --device cuda` takes the real shape, in fp16. The data are the
demo's English scenes; their nouns are renamed to 200 concepts, because the demo has few (`--concepts 0`: their own).
The census goes from encoded images to committed files, phase by phase. The plain forward has the same batches prepared
in memory. The census is first, so that the peak of memory is its own. The end of a shard is measured alone, too, with
more concepts.

    one H100:   python -m tests.bench.size --shape llava-1.5-7b --device cuda --samples 384
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.engine.clock import peak_memory, timed_phases
from mmray.features.census.activity import without_repeats
from mmray.features.census.inputs import open_data
from mmray.features.census.reduction import ConceptSums, candidates_kept
from mmray.features.census.settings import census_settings, shard_size_of
from mmray.features.census.shard import ShardAnalysis
from mmray.models.loading import LoadedModel, load
from mmray.models.parts import locate
from mmray.neurons.concepts import Mention, NounSource, noun_source
from mmray.neurons.split_on_oom import heap_kept
from mmray.runs import RunFolder
from mmray.runs.tables import to_bytes
from tests.bench import attribution
from tests.bench.attribution import Shape
from tests.bench.writing import markdown, write

COMMAND = "python -m tests.bench.size --cores 1 --write"
SHAPES = attribution.SHAPES | {
    "wide": Shape(
        {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 96,
            "patch_size": 12,
        },
        {
            "vocab_size": 2475,
            "hidden_size": 64,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 2,
        },
    )
}
OCCURRENCES = 32
"""Occurrences added at a time."""
NAMES = 2
"""New names of each noun: with them, the demo's captions have as many nouns as those of COCO."""
NOUNS, VOCABULARY = 3.5, 5_000
"""Nouns of a caption, and different nouns that captions have, by Zipf's law: about as in COCO."""
PER_NEURON = ("totals", "activity", "examples")
"""Parts that hardly grow with a shard's samples."""
PHASES = ("read", "decode", "score", "reduce", "candidates", "commit")
"""`score` includes the forward."""


def built(shape: Shape, device: str) -> LoadedModel:
    """Return a LLaVA of that shape with random weights, fp16 except on a CPU, and the demo's tokenizer."""
    processor: Any = load("demo").processor
    vision, text = CLIPVisionConfig(**shape.vision), LlamaConfig(**shape.text)
    size = vision.image_size
    processor.image_processor.size, processor.image_processor.crop_size = (
        {"shortest_edge": size},
        {"height": size, "width": size},
    )
    processor.patch_size = vision.patch_size
    settings = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.float16)
    try:
        with torch.device(device):
            network = LlavaForConditionalGeneration(settings).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return LoadedModel("random weights", load("demo").folder, network, processor, locate(network))


@dataclass
class Renamed:
    """Nouns of another source under `concepts` names, in turn; the source itself if that is 0."""

    source: NounSource
    concepts: int

    def __post_init__(self) -> None:
        self.numbers = count()

    def find(self, *given: Any, **named: Any) -> list[Mention]:
        """Return the nouns of a caption under their new names."""
        found = self.source.find(*given, **named)
        if not self.concepts:
            return found
        return [
            Mention(f"noun {next(self.numbers) % self.concepts}", noun.start, noun.stop)
            for noun in found
            for _ in range(NAMES)
        ]


def resident() -> int:
    """Return the memory that the process holds now, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TimedSums(ConceptSums):
    """Sums that count the CPU seconds of reducing concepts."""

    seconds = 0.0

    def _reduced(self, *given: Any) -> pa.Table:
        began = time.process_time()
        table = super()._reduced(*given)
        self.seconds += time.process_time() - began
        return table


def end_of_shard(widths: Sequence[int], concepts: int, device: torch.device) -> tuple[float, float, int]:
    """Return the CPU seconds to reduce and to encode the sums of so many concepts, and the bytes; scores are random."""
    sums = TimedSums(widths, candidates_kept(None, sum(widths)))
    # Each occurs once or twice, as most concepts of a shard do.
    occurrences = [f"noun {number}" for number in range(concepts) for _ in range(1 + number % 2)]
    sums.expected.update(occurrences)
    for first in range(0, len(occurrences), OCCURRENCES):
        own = occurrences[first : first + OCCURRENCES]
        scores = [torch.randn(len(own), width, device=device) for width in widths]
        sums.add(own, scores, scores)
    tables, began = sums.tables(), time.process_time()
    size = sum(len(to_bytes(table)) for table in tables)
    return sums.seconds, time.process_time() - began, size


def concepts_of(samples: int) -> int:
    """Return how many concepts so many captions have, with nouns drawn by Zipf's law."""
    chances = 1 / (np.arange(VOCABULARY) + 5.0)
    return int((1 - np.exp(-chances / chances.sum() * NOUNS * samples)).sum())


def of_default_shard(parts: Mapping[str, int], samples: int, concepts: int, neurons: int) -> dict[str, float]:
    """Return bytes per sample in a shard of the default size, from those of a smaller shard, by part.

    Parts per neuron are written once per shard, concepts once per concept, the rest once per sample.
    """
    default = shard_size_of(neurons)
    per_concept = parts["concepts"] / max(1, concepts)
    found = {name: size / (default if name in PER_NEURON else samples) for name, size in parts.items()}
    return found | {"concepts": per_concept * concepts_of(default) / default}


class Bench:
    """One model, the samples of one shard, and the folder that it is committed to."""

    def __init__(self, arguments: argparse.Namespace, out: str) -> None:
        asked = {"model": "demo", "data": "demo", "out": out, "batch_size": arguments.batch_size}
        self.settings = census_settings(asked)
        self.model = built(SHAPES[arguments.shape], arguments.device)
        source = open_data(self.settings)
        self.nouns = noun_source("auto", source.objects_vocabulary(), source.translations())
        self.concepts = arguments.concepts
        rows = sum(file.rows for file in source.files())
        found = read_shard(source, cut(source.files(), rows).shards[0])
        # With one label, the language, as most data sets have.
        english = (row for row in found if isinstance(row, Sample) and row.language == "en")
        self.samples = [replace(row, domain=None) for row in islice(english, arguments.samples)]
        self.folder = RunFolder.at(out)
        self.numbers = count()
        self.rows = 0
        """Concepts of the last census."""
        # Other processes disturb CPU time less than wall time.
        self.clock = time.perf_counter if self.model.device.type == "cuda" else time.process_time

    def analysis(self, number: int = 0) -> ShardAnalysis:
        """Return the analysis of the shard."""
        nouns: Any = Renamed(self.nouns, self.concepts)
        return ShardAnalysis(self.model, self.settings, nouns, number)

    def census(self) -> tuple[float, dict[str, float], dict[str, int]]:
        """Return the seconds of a census from encoded images to committed files, those per phase, and bytes by part."""
        number = next(self.numbers)
        began = self.clock()
        with timed_phases() as phases:
            tables = self.analysis(number).run(self.samples)
            tables["activity"] = without_repeats(tables["activity"])
        self.rows = len(tables["concepts"])
        receipt = self.folder.commit_shard(number, tables, len(self.samples), 0.0, phases=phases)
        seconds = self.clock() - began
        sizes = {entry.key: entry.size for entry in self.folder.store.list("shards/")}
        return seconds, receipt.phases, {name: sizes[key] for name, key in (receipt.parts or {}).items()}

    def plain(self, prepared: list[Any]) -> float:
        """Return the seconds of a plain forward of prepared batches."""
        began = self.clock()
        with torch.inference_mode():
            for batch in prepared:
                self.model.network(**batch.to(self.model.device, self.model.network.dtype))
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="wide")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--concepts", type=int, default=200, help="0: the nouns' own")
    parser.add_argument("--end", type=int, default=600, help="concepts of the shard whose end is measured alone")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int)
    parser.add_argument("--write", action="store_true", help="put the table into the README of the benchmarks")
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        torch.set_num_threads(arguments.cores)
    with tempfile.TemporaryDirectory() as out:
        table = run(arguments, out)
    print(table)
    if arguments.write:
        write("tests/bench/README.md", COMMAND, table)


def run(arguments: argparse.Namespace, out: str) -> str:
    """Run all, and return the table in Markdown."""
    bench = Bench(arguments, out)
    loaded, cuda = resident(), bench.model.device.type == "cuda"
    weights = torch.cuda.memory_allocated() if cuda else 0
    censuses = [bench.census()]
    peak = peak_memory()
    above = peak["gpu"] - weights if cuda else peak["host"] - loaded
    prepared = [batch for _, batch in bench.analysis().encoded(bench.samples)]
    forwards = [bench.plain(prepared)]
    with heap_kept(bench.model.device):
        kept = bench.plain(prepared)
    for _ in range(arguments.rounds - 1):
        censuses.append(bench.census())
        forwards.append(bench.plain(prepared))
    plain, samples, parts = statistics.median(forwards), len(bench.samples), Counter(censuses[0][2])
    rows = [
        ("plain forward of prepared batches", f"{plain:.2f} s", "1"),
        ("the same, with freed memory kept as in a census", f"{kept:.2f} s", f"{kept / plain:.3f}"),
    ]
    seconds = statistics.median(seconds for seconds, _, _ in censuses)
    rows.append(("census, from encoded images to committed files", f"{seconds:.2f} s", f"{seconds / plain:.3f}"))
    wall = Counter[str]()
    for _, phases, _ in censuses:
        wall.update(phases)
    rows += [
        (f"`{name}`, as a fraction of the census", f"{100 * wall[name] / wall.total():.1f} %", "") for name in PHASES
    ]
    rows.append((f"memory above the model's, of the {'GPU' if cuda else 'process'}", f"{above / 1e9:.2f} GB", ""))
    rows += [(f"bytes of `{name}` per sample", f"{size / samples / 1e3:.1f} kB", "") for name, size in parts.items()]
    rows.append(("bytes per sample", f"{parts.total() / samples / 1e3:.1f} kB", ""))
    neurons = sum(bench.model.widths)
    default = of_default_shard(parts, samples, bench.rows, neurons)
    said = ", ".join(f"{name} {size / 1e3:.1f}" for name, size in default.items() if size >= 100)
    row = f"the same in a shard of {shard_size_of(neurons):,}, computed ({said})"
    rows.append((row, f"{sum(default.values()) / 1e3:.1f} kB", ""))
    reduced, encoded, size = end_of_shard(bench.model.widths, arguments.end, bench.model.device)
    rows.append((f"shard of {arguments.end} concepts: reduce them to candidates", f"{reduced:.2f} s", ""))
    rows.append((f"shard of {arguments.end} concepts: encode {size / 1e6:.1f} MB", f"{encoded:.2f} s", ""))
    return markdown(
        [f"{arguments.shape}, {samples} samples, {arguments.concepts or 'own'} concepts", "", "of plain"], rows
    )


if __name__ == "__main__":
    main()
