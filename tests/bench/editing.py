"""What edits of the demo do: `python -m tests.bench.editing [swaps] [suppress] [hallucination] [joint] [frontier] …`.

Edits are made on a census of the demo's 1,536 scenes and measured on its 384 other ones, which no edit saw:

swaps           --swaps random pairs of concepts, and of the first --controls of them the baselines, with the same data,
                objective and number of neurons; success and locality of each, and their harmonic mean
suppress        bomb, coffin and scorpion
hallucination   one edit against what the model claims and is not there; --fresh scenes made for it
joint           --swaps edits at once in one checkpoint
frontier        generality against each locality by method, number of neurons, layers and weight of kept text: the first
                half of --swaps pairs by every choice, the other half by each method's best
bounds          every bound of an edit, over --swaps pairs after the first --skip, for `learned` and --methods, then
                over the words of `suppress`; shares with their n and intervals
size            what an edit of LLaVA-1.5-7B holds and costs, by arithmetic on its shape; no weights are loaded

Without a part, the first four.
Figures are shares over all samples of all edits. `--model`, `--data` and `--evaluation` take another captioner.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mmray
from jobs.demo.dataset import write_parquet
from jobs.demo.scenes import World
from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.demo import EVALUATION
from mmray.errors import InputError
from mmray.features.census.inputs import open_data
from mmray.features.census.settings import census_settings
from mmray.features.editing.bounds import BOUNDS
from mmray.features.editing.dataset import EditDataset
from mmray.features.editing.edit import WeightEdit
from mmray.features.editing.kept_answers import (
    ASKED,
    HELD_OUT,
    KEPT,
    LEARNED_TEXT,
    LONGEST_TEXT,
    read_kept_text,
)
from mmray.features.editing.methods import ABOUT_IMAGES, make_edit
from mmray.features.editing.settings import EditSettings, edit_settings
from mmray.features.editing.training import TrainingConfig
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.evaluate import Evaluated, evaluate
from mmray.features.evaluation.measures import measure_of
from mmray.features.evaluation.settings import measure_settings
from mmray.neurons.model import load_model
from mmray.objects.statistics import ObjectStatistics, gather_statistics
from mmray.statistics.shares import wilson
from tests.support.word_ban import WordBan

SEED = 2024
"""Draws the pairs of concepts."""
BASELINES = ("random", "activation", "last-mlp", "rank-one", "lora")
SENSITIVE = ("bomb", "coffin", "scorpion")
PARTS = ("swaps", "suppress", "hallucination", "joint")
MORE = ("bounds", "frontier", "size")
FRONTIER: dict[str, list[dict[str, Any]]] = {
    method: [{"method": method, **choice} for choice in choices]
    for method, choices in {
        "learned": [{"neurons": n, "text_weight": w} for n in (25, 50, 100) for w in (0.3, 1.0, 3.0)]
        + [{"neurons": 100, "layers": 3}],
        "patch": [{}],
        "null-space": [{"neurons": n} for n in (25, 50, 100)],
        "plain": [{"neurons": n} for n in (25, 50, 100)],
        "random": [{"neurons": n} for n in (50, 100)],
        "last-mlp": [{"text_weight": w} for w in (1.0, 3.0)],
        "rank-one": [{"text_weight": w} for w in (1.0, 3.0)],
    }.items()
}
"""Choices of each method."""
GENERAL = 40
"""Of `bounds`: no more questions about objects are measured than general prompts."""
CANDIDATES = 12_000
"""Of a vocabulary of 32,064, assumed."""
SHOWN = {
    "reliability": "reliability",
    "image_generality": "image generality",
    "text_generality": "text generality",
    "image_locality": "other captions unchanged",
    "image_locality_questions": "other answers unchanged",
    "image_locality_span": "the same, teacher-forced",
    "text_locality": "text answers unchanged",
    "image_locality_legacy": "locality, legacy",
}
"""Measure → its column."""
HALLUCINATION = ("hallucination", "companion_named", "chair_i", "chair_s", "recall", "image_locality")


@dataclass
class Ground:
    """A run to edit on, and samples to measure on."""

    dataset: EditDataset
    samples: list[Sample]
    facts: ObjectStatistics
    before: BaselineReplies = field(init=False)

    def __post_init__(self) -> None:
        self.before = BaselineReplies(self.dataset.model)

    @classmethod
    def at(cls, run: mmray.Run, evaluation: str) -> Ground:
        """Return the ground of a run whose model and data are at hand."""
        settings = run.info["settings"]
        model = load_model(settings["model"], settings["dtype"])
        source = open_data(census_settings({"model": "demo", "data": evaluation, "out": "unused"}))
        (shard,) = cut(source.files(), 10**6).shards
        samples = [row for row in read_shard(source, shard) if isinstance(row, Sample)]
        facts = gather_statistics((sample.objects for sample in samples), source.translations())
        return cls(EditDataset(model, run, prompt=settings["prompt"]), samples, facts)

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Return random pairs of concepts that the run names three times or more and the other samples show."""
        shown = {name for sample in self.samples for name in sample.objects or ()}
        known = sorted(name for name, n in self.dataset.run.concepts.items() if n >= 3 and name in shown)
        draw = random.Random(SEED)
        return [tuple(draw.sample(known, 2)) for _ in range(count)]  # type: ignore[misc]

    def made(self, *wishes: dict[str, Any]) -> WeightEdit:
        """Make one edit for these wishes."""
        settings: list[EditSettings] = [edit_settings(wish) for wish in wishes]
        return make_edit(self.dataset, settings)

    def measured(self, edit: WeightEdit | WordBan, others: int | None = None, **settings: int) -> Evaluated:
        """Measure an edit on all samples, or on those with its source and on so many drawn from the others."""
        own = self.dataset.read(name for purpose in edit.purposes for name in purpose.samples)
        measured = measure_settings(**{"pope_objects": 0, "bleu": False, "draws": 200} | settings)
        samples = self.samples
        if others is not None:
            sources = {purpose.source for purpose in edit.purposes}
            with_source = [sample for sample in samples if sources & set(sample.objects or ())]
            rest = [sample for sample in samples if not sources & set(sample.objects or ())]
            samples = with_source + random.Random(str(sources)).sample(rest, min(others, len(rest)))
        return evaluate(
            self.dataset.model, edit, samples, measured, baseline=self.before, own=own, statistics=self.facts
        )


@dataclass
class Row:
    """Measures of several edits, added up over samples."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: list[float] = field(default_factory=list)

    def add(self, edit: WeightEdit | WordBan, found: Evaluated) -> None:
        """Add an edit."""
        self.seconds.append(edit.facts["seconds"])
        for name, measure in found.measures.items():
            if measure["n"]:
                self.sums[name] += measure["after"] * measure["n"]
                self.counts[name] += measure["n"]

    def __getitem__(self, name: str) -> float:
        return self.sums[name] / self.counts[name] if self.counts[name] else float("nan")

    @property
    def balance(self) -> float:
        """The same with answers and text-only replies, which stand for the rest of what must stay."""
        names = ("reliability", "image_generality", "image_locality", "image_locality_questions", "text_locality")
        values = [self[name] for name in names]
        return len(values) / sum(1 / value for value in values) if all(values) else 0.0

    @property
    def harmonic(self) -> float:
        """The harmonic mean of reliability, image generality and image locality."""
        three = [self[name] for name in ("reliability", "image_generality", "image_locality")]
        return 3 / sum(1 / value for value in three) if all(three) else 0.0

    def line(self, name: str) -> str:
        """Return the row of a Markdown table."""
        cells = [f"{self[measure]:.3f}" for measure in SHOWN]
        seconds = sum(self.seconds) / len(self.seconds)
        return f"| {name} | {len(self.seconds)} | {' | '.join(cells)} | {self.harmonic:.3f} | {seconds:.1f} |"


def header() -> str:
    """Return the head of the table of edits."""
    names = ["method", "edits", *SHOWN.values(), "harmonic mean", "seconds an edit"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def swaps(ground: Ground, count: int, controls: int, methods: tuple[str, ...], others: int | None) -> None:
    """Print the table of swaps by method."""
    rows: dict[str, Row] = defaultdict(Row)
    few: dict[str, Row] = defaultdict(Row)
    for number, (source, target) in enumerate(ground.pairs(count)):
        for method in ("learned", *methods) if number < controls else ("learned",):
            edit = ground.made({"source": source, "target": target, "method": method})
            found = ground.measured(edit, others)
            for table in (rows, few) if number < controls else (rows,):
                table[method].add(edit, found)
            print(f"{source} → {target}, {method}: {_short(found)}", file=sys.stderr, flush=True)
    print(f"\n{count} swaps\n\n{header()}\n{rows['learned'].line('learned')}")
    if controls:
        print(f"\nThe first {controls} of them by every method\n\n{header()}")
        for method, row in few.items():
            print(row.line(method))


def _short(found: Evaluated) -> str:
    return ", ".join(
        f"{name} {row['after']:.3f} of {row['n']}" for name, row in found.measures.items() if name in SHOWN and row["n"]
    )


def suppress(ground: Ground) -> None:
    """Print what became of sensitive words, by an edit and by a ban at decoding."""
    rows: dict[str, Row] = defaultdict(Row)
    for word in SENSITIVE:
        edit = ground.made({"suppress": word})
        for method, change in (("learned", edit), ("ban", WordBan(ground.dataset.model, (word,), edit.purposes))):
            found = ground.measured(change)
            rows[method].add(change, found)
            print(f"{word}, {method}: {_short(found)}", file=sys.stderr, flush=True)
    print(f"\nsuppressed {', '.join(SENSITIVE)}\n\n{header()}")
    for method, row in rows.items():
        print(row.line(method))
    for method, row in rows.items():
        gone = sum(row.sums[name] for name in ("reliability", "image_generality"))
        rest = sum(row.sums[f"{name}_rest_unchanged"] for name in ("reliability", "image_generality"))
        captions = sum(row.counts[name] for name in ("reliability", "image_generality"))
        print(f"\n{method}: gone from {gone / captions:.3f} of {captions} captions that had them; the rest of those")
        print(f"captions unchanged in {rest / captions:.3f}")


def hallucination(ground: Ground) -> None:
    """Print what one edit does to hallucination."""
    edit = ground.made({"reduce_hallucination": True, "neurons": 150, "kept": 1000, "samples": 40})
    pairs = ", ".join(f"{context} → {word}" for context, word in edit.purpose.pairs)
    print(f"\nhallucination, {len(ground.samples)} fresh scenes; {edit.facts['seconds']:.0f} s; pairs found: {pairs}\n")
    print("| measure | before | after | 95 % | n |\n|---|---|---|---|---|")
    measures = ground.measured(edit).measures
    for name in HALLUCINATION:
        row = measures.get(name)
        if row and row["n"]:
            print(
                f"| {name} | {row['before']:.4f} | {row['after']:.4f} | {row['low']:.4f} to {row['high']:.4f} "
                f"| {row['n']} |"
            )


def joint(ground: Ground, count: int, others: int | None) -> None:
    """Print what many swaps in one checkpoint do, made as one edit."""
    pairs = ground.pairs(count)
    together = Row()
    edit = ground.made(*({"source": source, "target": target} for source, target in pairs))
    together.add(edit, ground.measured(edit, others, pope_objects=1, text_count=GENERAL))
    print(f"\n{count} swaps in one checkpoint\n\n{header()}\n{together.line('together')}\n")
    print(bounds_table(together), flush=True)


def bounds(
    ground: Ground, count: int, skip: int, methods: tuple[str, ...], others: int | None, suppressed: Sequence[str]
) -> None:
    """Print every bound's measure over swaps by method, and over suppressed words."""
    groups = {
        method: [{"source": s, "target": t, "method": method} for s, t in ground.pairs(skip + count)[skip:]]
        for method in ("learned", *methods)
    }
    for name, wishes in (groups | {"suppressed": [{"suppress": word} for word in suppressed]}).items():
        row, seconds = Row(), 0.0
        for wish in wishes:
            began = time.process_time()
            try:
                edit = ground.made(wish)
            except InputError as error:
                print(f"{wish}: {error}", file=sys.stderr, flush=True)
                continue
            made = time.process_time() - began
            seconds += made
            found = ground.measured(edit, others, pope_objects=1, text_count=GENERAL)
            row.add(edit, found)
            facts = {
                bound.measure: found.measures[bound.measure] for bound in BOUNDS if bound.measure in found.measures
            }
            values = ", ".join(f"{key} {one['after']} of {one['n']}" for key, one in facts.items())
            taken = f"{made:.0f} s of CPU, {time.process_time() - began:.0f} with its evaluation"
            print(f"{edit.purpose.summary}, {name}: {values}; {taken}", file=sys.stderr, flush=True)
        if row.seconds:
            print(f"\n{name}, {len(row.seconds)} edits, {seconds / len(row.seconds):.0f} s of CPU each\n")
            print(bounds_table(row), flush=True)


def bounds_table(row: Row) -> str:
    """Return the Markdown table of the measures that have a bound."""
    lines = ["| evaluated | n | after | 95 % | bound |", "|---|---|---|---|---|"]
    for bound in BOUNDS:
        n = row.counts[bound.measure]
        if n:
            value, interval = row[bound.measure], "–"
            if measure_of(bound.measure).unit == "share":
                interval = " – ".join(f"{100 * limit:.1f}" for limit in wilson(value, n)) + " %"
            lines.append(f"| {bound.subject} | {n} | {value:.4f} | {interval} | {bound.limit} |")
    return "\n".join(lines)


def frontier(ground: Ground, count: int, others: int | None) -> None:
    """Print what every choice does on half of the pairs, and what each method's best does on the other half."""
    pairs = ground.pairs(count)
    chosen: dict[str, dict[str, Any]] = {}
    print(f"\nfrontier, chosen on {count // 2} pairs\n\n{header()}", flush=True)
    for method, choices in FRONTIER.items():
        rows = [(_measured_row(ground, pairs[: count // 2], choice, others), choice) for choice in choices]
        for row, choice in rows:
            print(row.line(_named(choice)), flush=True)
        # The first of equals, which has the fewest neurons.
        chosen[method] = max(rows, key=lambda pair: pair[0].balance)[1]
    print(f"\nThe best of each method on the other {count - count // 2} pairs\n\n{header()}", flush=True)
    for choice in chosen.values():
        print(_measured_row(ground, pairs[count // 2 :], choice, others).line(_named(choice)), flush=True)


def _named(choice: dict[str, Any]) -> str:
    return ", ".join(str(value) if name == "method" else f"{name} {value}" for name, value in choice.items())


def _measured_row(ground: Ground, pairs: list[tuple[str, str]], choice: dict[str, Any], others: int | None) -> Row:
    row = Row()
    for source, target in pairs:
        edit = ground.made({"source": source, "target": target, **choice})
        row.add(edit, ground.measured(edit, others))
    return row


def size() -> None:
    """Print what an edit of LLaVA-1.5-7B's last layer holds and costs, from its configuration alone."""
    config = LlavaConfig(text_config=LlamaConfig(intermediate_size=11008, num_hidden_layers=32, vocab_size=32064))
    with torch.device("meta"):
        network = LlavaForConditionalGeneration(config)
    text = config.text_config
    decoder = sum(p.numel() for p in network.model.language_model.layers.parameters())
    prompts, image, caption = len(read_kept_text(None)["prompts"]), 576, 16
    tested = prompts // HELD_OUT
    counts = {
        "caption": (KEPT, image + 2 * caption, caption),
        "answer": (2 * ASKED, image + 2 * caption, 2),
        "text-only reply": (prompts - tested, LEARNED_TEXT + caption, LEARNED_TEXT),
        "text-only reply, held out": (tested, LONGEST_TEXT + caption, LONGEST_TEXT),
    }
    # Of the last block at each token of an answer: its output and all neurons' activations, in half precision.
    token = 2 * (text.hidden_size + text.intermediate_size)
    print("\n| kept | answers | tokens run | tokens held | MiB per answer | TFLOP per answer | MiB | TFLOP |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (n, run, held) in counts.items():
        mib, work = held * token / 2**20, 2 * decoder * run / 1e12
        print(f"| {name} | {n} | {run} | {held} | {mib:.2f} | {work:.1f} | {n * mib:.0f} | {n * work:.0f} |")
    step = 6 * TrainingConfig().positions * len(ABOUT_IMAGES) * CANDIDATES * text.hidden_size / 1e12
    table, moment = 4 * CANDIDATES * text.hidden_size / 2**20, 4 * text.intermediate_size**2 / 2**20
    print(f"\nwith {CANDIDATES:,} candidates a step is {step:.2f} TFLOP, and their unembeddings {table:.0f} MiB")
    print(f"second moment of a whole layer's {text.intermediate_size:,} neurons: {moment:.0f} MiB")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS + MORE)}; default: the first four")
    parser.add_argument("--run", help="a census that is there; default: one is made")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--evaluation", default=str(EVALUATION))
    parser.add_argument("--swaps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=0, help="of bounds: pairs that are left out")
    parser.add_argument("--suppressed", nargs="*", default=SENSITIVE, help="of bounds: words to suppress")
    parser.add_argument("--controls", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=BASELINES)
    parser.add_argument("--others", type=int, help="scenes without the source that swaps are measured on; default: all")
    parser.add_argument("--fresh", type=int, default=1000, help="scenes for hallucination; 0: --evaluation")
    given = parser.parse_args()
    wanted = given.parts or PARTS
    if "size" in wanted:
        size()
    if set(wanted) <= {"size"}:
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = mmray.open_run(given.run) if given.run else mmray.census(given.model, given.data, f"{folder}/run")
        ground = Ground.at(run, given.evaluation)
        if "swaps" in wanted:
            swaps(ground, given.swaps, given.controls, tuple(given.methods), given.others)
        if "suppress" in wanted:
            suppress(ground)
        if "bounds" in wanted:
            bounds(ground, given.swaps, given.skip, tuple(given.methods), given.others, given.suppressed)
        if "frontier" in wanted:
            frontier(ground, given.swaps, given.others)
        if "joint" in wanted:
            joint(ground, given.swaps, given.others)
        if "hallucination" in wanted:
            if given.fresh:
                world = World.load()
                write_parquet(
                    Path(folder) / "fresh.parquet", world, world.sample(given.fresh, SEED), seed=SEED, english_share=1.0
                )
                ground = Ground.at(run, f"{folder}/fresh.parquet")
            hallucination(ground)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
