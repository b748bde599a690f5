"""What the neurons of languages and domains are and do: `python -m tests.bench.selectivity [RUN] [--part …]`.

language  each language's neurons zeroed, by LAPE as published and by contribution: what that costs its own held-out
          captions, the other languages', and random neurons of the same layers
steering  English prompts steered to Spanish: which neurons, how many, set to what, where; captions that turn
domain    the domains' neurons of the vision tower and of the decoder, by image tokens and by text tokens apart:
          matrix with intervals, with shuffled labels
cost      time of a census with its tables of activity, and without

Without RUN, a census of the demo's data, vision tower and all, is made first; RUN is one made with `--module vision`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import torch

import mmray
from jobs.demo.scenes import load_concepts
from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.features.census import shard
from mmray.features.census.inputs import open_data
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.neurons import statistics as token_statistics
from mmray.neurons.concepts import find_forms, noun_source
from mmray.neurons.token_sums import MODALITIES, Span

PARTS = ("language", "steering", "domain", "cost")
RATES = {"contribution": (0.05, 0.02, 0.01), "lape": (0.01, 0.05)}
HELD_OUT = 0.15
STEERED: tuple[dict[str, Any], ...] = (
    {"method": "contribution", "rate": 0.05},
    {"method": "contribution", "rate": 0.05, "steer_factor": 1.0},
    {"method": "contribution", "rate": 0.05, "steer_values": "mean", "steer_factor": 1.0},
    {"method": "contribution", "rate": 0.05, "steer_positions": "all"},
    {"method": "contribution", "rate": 0.01},
    {"method": "contribution", "steer_neurons": "switch", "steer_share": 0.05},
    {"method": "contribution", "steer_neurons": "switch", "steer_share": 0.25},
    {"method": "lape", "steer_values": "mean", "steer_factor": 1.0},
    {"method": "lape"},
    {"method": "lape", "rate": 0.05},
)
"""What is tried: which neurons, how many, set to what (as published: their mean over answers), and where."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    parts = arguments.part or PARTS
    with tempfile.TemporaryDirectory() as out:
        run = arguments.run or out
        if not arguments.run and set(parts) != {"cost"}:
            mmray.census("demo", "demo", out, module="vision", workers=arguments.workers)
        for part in parts:
            if part == "cost":
                cost(arguments.samples, arguments.rounds)
            else:
                {"language": language, "steering": steering, "domain": domain}[part](run, arguments.workers)


def tables(run: str, **settings: Any) -> dict[str, pa.Table]:
    return mmray.selectivity(run, **{"bootstraps": 0, "permutations": 0, "held_out": HELD_OUT, **settings})


def language(run: str, workers: int | None) -> None:
    heads = ("neurons", "own", "others", "ratio", "random")
    print(f"{'method':14s}{'share':>6s}  {'language':10s}" + "".join(f"{head:>9s}" for head in heads))
    for method, rates in RATES.items():
        for rate in rates:
            found = tables(run, method=method, rate=rate, interventions=True, questions=0, workers=workers)
            for label, facts in changes(found["interventions"]):
                ratio = facts["own"] / facts["others"] if facts["others"] > 0 else float("inf")
                print(
                    f"{method:14s}{rate:6.0%}  {label:10s}{facts['neurons']:9.0f}{facts['own']:+9.3f}"
                    f"{facts['others']:+9.4f}{ratio:9.1f}{facts['random']:+9.4f}"
                )


def changes(rows: pa.Table) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each label with the change of its own captions' cost, the others' mean, and under random neurons."""
    found = {(row["masked"], row["control"], row["label"]): row for row in rows.to_pylist() if row["measure"] == "nll"}
    for label in sorted({masked for masked, _, _ in found}):
        others = [
            row["change"] for (masked, kind, of), row in found.items() if masked == label != of and kind == "selected"
        ]
        own = found[label, "selected", label]
        yield (
            label,
            {
                "neurons": own["neurons"],
                "own": own["change"],
                "others": sum(others) / len(others),
                "random": found[label, "random", label]["change"],
            },
        )


def steering(run: str, workers: int | None) -> None:
    """A caption is turned where it reads like Spanish and names an object of the image in Spanish."""
    samples = {sample.sample_id: sample for sample in demo_samples()}
    print(f"\n{'neurons':>8s} {'turned':>7s} {'every word':>11s} {'objects':>8s}  steering en → es")
    for settings in STEERED:
        rows = tables(run, steer="en:es", workers=workers, **settings)["steering"].to_pylist()
        named = [spanish_objects(row["after"], samples[row["sample_id"]].objects or ()) for row in rows]
        turned = [row["label_after"] == "es" and any(some) for row, some in zip(rows, named, strict=True)]
        whole = sum(row["words_after"] == 1.0 for row in rows) / len(rows)
        recall = sum(map(sum, named)) / sum(map(len, named))
        print(
            f"{rows[0]['neurons']:8,} {sum(turned) / len(rows):7.0%} {whole:11.0%} {recall:8.0%}  {settings['method']} "
            f"{settings.get('rate', 0.01):.0%}, n {len(rows)}: {rows[0]['steering']}"
        )
        for row in [*rows[:2], *(row for row, good in zip(rows, turned, strict=True) if not good)][:3]:
            print(f"{'':30s}{row['before']}  →  {row['after'][:80]}")


def demo_samples() -> list[Sample]:
    source = open_data(census_settings({"model": "demo", "data": "demo", "out": "none"}))
    files = source.files()
    (piece,) = cut(files, sum(file.rows for file in files)).shards
    return [row for row in read_shard(source, piece) if isinstance(row, Sample)]


def spanish_objects(caption: str, objects: Sequence[str]) -> list[bool]:
    """Tell of each object, named in English, whether a caption names it in Spanish."""
    names = [load_concepts()[name].names["es"].casefold() for name in objects]
    return [bool(find_forms(caption, frozenset({name}), "es")) for name in names]


def domain(run: str, workers: int | None) -> None:
    for settings in ({"module": "vision"}, {"count": "image"}, {"count": "caption"}):
        found = tables(
            run, by="domain", interventions=True, permutations=20, bootstraps=20, workers=workers, **settings
        )
        facts = found["selective_labels"].to_pylist()
        print(f"\nby domain · {facts[0]['method']} · {facts[0]['module']} · {facts[0]['modality']} tokens")
        for row in facts:
            print(
                f"{row['label']:10s}{row['neurons']:6d} neurons, {row['chance']:6.1f} reach the cut with shuffled "
                f"labels; stability {row['stability']:.2f}"
            )
        for row in found["interventions"].to_pylist():
            print(
                f"{row['measure']:10s}zeroed {row['masked']:10s}{row['control']:10s}{row['neurons']:5d} → "
                f"{row['label']:10s}{row['change']:+8.4f}  ({row['low']:+.4f} to {row['high']:+.4f}), n {row['n']}"
            )


def extremes_alone(values: torch.Tensor, _: torch.Tensor, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand for `reduce_tokens` in a census that keeps the extreme samples of neurons and counts no activity."""
    rows, _, width = values.shape
    reached = []
    for span in spans:
        part = values[:, span.start : span.stop].float()
        if not part.shape[1]:
            reached.append(part.new_full((rows, 2 * width), -torch.inf))
            continue
        above, below = (part, part) if span.outside is None else (part + span.outside, part - span.outside)
        reached.append(torch.cat([above.amax(1), -below.amin(1)], dim=1))
    return values.new_zeros(len(MODALITIES), 3, rows, width), torch.stack(reached)


def cost(samples: int, rounds: int) -> None:
    """Time a shard with activity by language and domain, of all samples alone, and with extreme samples alone."""
    settings = census_settings({"model": "demo", "data": "demo", "out": "none"})
    model, rows = mmray.load_model("demo"), demo_samples()[:samples]
    source = open_data(settings)
    nouns = noun_source(settings.nouns, source.objects_vocabulary(), source.translations())

    def timed() -> float:
        # Of the processor, so that what else the machine does disturbs less.
        began = time.process_time()
        ShardAnalysis(model, settings, nouns, 0).run(rows)
        return time.process_time() - began

    def unlabelled() -> float:
        with patch.object(shard, "labels_of", lambda _: {}):
            return timed()

    def uncounted() -> float:
        with patch.object(token_statistics, "reduce_tokens", extremes_alone):
            return unlabelled()

    timed()
    times = [(timed(), unlabelled(), uncounted()) for _ in range(rounds)]
    print(f"\ncensus of {samples} scenes, {rounds} rounds in turns; processor time")
    for name, column in (("activity by language and domain", 0), ("activity of all samples", 1), ("no activity", 2)):
        ratios = sorted(each[0] / each[column] for each in times)
        seconds = statistics.median(each[column] for each in times)
        print(
            f"{name:34s}{seconds:8.2f} s   by label / it {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
