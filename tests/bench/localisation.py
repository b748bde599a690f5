"""Do the located neurons matter: `python -m tests.bench.localisation --model MODEL [--concepts N]`.

For every method the K highest neurons of each concept are zeroed at all positions, and the concept's noun is read in
its own images, the other nouns in images without it: mean fall of the log-probability in nats, with bootstrap intervals
over concepts, and the ratio of the two. Neurons are ranked on DATA, and measured on other images (`--fresh`). A control
zeroes random neurons, as many in each layer as the method above it.

Concepts are cut into two halves, by turns of the alphabet. What a method was tuned on is in the half `tuned`; the
figures to quote are those of the half `shown`.

    python -m tests.bench.localisation --model demo
    python -m tests.bench.localisation --model MODEL          # about ten minutes for 135 M parameters on two cores
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import mmray.demo
from mmray.cluster.worker import open_data
from mmray.datasets.samples import Sample
from mmray.datasets.shards import cut, read_shard
from mmray.models.loading import LoadedModel, load
from mmray.neurons.captured import capturing
from mmray.neurons.concepts import NounSource, noun_source
from mmray.neurons.places import Place, place_mentions
from mmray.neurons.ranking import locate_index, selective_scores, specific_scores
from mmray.neurons.reduction import ConceptMerge, ConceptSums
from mmray.neurons.scoring import Scored, forward, score_batch, score_captured
from mmray.neurons.shard import Captioned, ShardAnalysis
from mmray.settings import CensusSettings, census_settings
from tests.bench.ablating import Ablator

SIZES = (10, 50, 100)
"""Neurons zeroed."""


@dataclass(frozen=True)
class Method:
    """One way of ranking: by which score of the census, and by which of its columns."""

    score: str
    folded: bool = False
    by: str = "score"
    control: bool = False
    """Random neurons of the same layers are zeroed too."""


METHODS = {
    "random": Method("random"),
    "activation": Method("activation"),
    "gate, as released": Method("gate"),
    "gradient, as published": Method("gradient"),
    "contribution": Method("contribution"),
    "contribution, folded": Method("contribution", folded=True),
    "specific": Method("contribution", by="specific"),
    "specific, folded": Method("contribution", folded=True, by="specific", control=True),
    "selective, folded": Method("contribution", folded=True, by="selective"),
    "effect": Method("effect"),
    "selective effect": Method("effect", by="selective", control=True),
}


@dataclass
class Data:
    """English samples with the nouns that their captions name."""

    settings: CensusSettings
    samples: list[Sample]
    nouns: NounSource
    named: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for sample in self.samples:
            mentions = self.nouns.find(sample.caption, sample.language, sample.objects)
            self.named[sample.sample_id] = {mention.concept for mention in mentions}

    def of(self, concept: str) -> list[Sample]:
        """Return the samples whose caption names the concept."""
        return [sample for sample in self.samples if concept in self.named[sample.sample_id]]


def read(model: str, data: str, nouns: NounSource | None = None) -> Data:
    """Return the English samples of a data set."""
    settings = census_settings({"model": model, "data": data, "out": "unused", "batch_size": 8})
    source = open_data(settings)
    files = source.files()
    rows = sum(file.rows for file in files)
    found = [row for row in read_shard(source, cut(files, rows, rows).shards[0]) if isinstance(row, Sample)]
    english = [sample for sample in found if (sample.language or "en").startswith("en")]
    nouns = nouns or noun_source("auto", source.objects_vocabulary(), source.translations())
    return Data(settings, english, nouns)


def places_of(items: Sequence[Captioned], batch: object) -> list[Place]:
    """Return the places of all nouns of a batch."""
    return [
        place
        for row, item in enumerate(items)
        for place in place_mentions(batch, row, item.sample.sample_id, item.mentions)  # type: ignore[arg-type]
    ]


def locate(model: LoadedModel, data: Data, samples: Sequence[Sample], wanted: set[tuple[str, bool]]) -> dict:
    """Return the census's sums for every (score, folded) that a method wants, over all nouns of these samples."""
    sums = {key: ConceptSums(model.widths) for key in wanted}
    for items, batch in ShardAnalysis(model, data.settings, data.nouns, 0).encoded(samples):
        places = places_of(items, batch)
        with torch.inference_mode(), capturing(model, batch, places) as captured:
            forward(model, batch)
        for (score, folded), collected in sums.items():
            if score in ("gradient", "gradient-last", "effect"):
                scored: Scored = score_batch(model, batch, places, score)
            else:
                scored = score_captured(model, captured, score, folded=folded)
            collected.begin([place.concept for place in places])
            for layer, (scores, activation) in enumerate(zip(scored.scores, scored.activation, strict=True)):
                collected.add(layer, scores, activation)
    merged = {key: ConceptMerge(sum(model.widths)) for key in wanted}
    for key, collected in sums.items():
        merged[key].add(*collected.tables(sum(model.widths)))
    return merged


def highest(merge: ConceptMerge, concept: str, by: str, count: int) -> np.ndarray:
    """Return the concept's first neurons in the order of a column of the rankings."""
    scores = merge.sums(concept)
    values = {
        "score": lambda: scores.score,
        "specific": lambda: specific_scores(scores, merge.total, merge.n),
        "selective": lambda: selective_scores(scores, merge.total_squares, merge.n),
    }[by]()
    return np.lexsort((scores.neuron, -values))[:count]


def alike(neurons: np.ndarray, widths: Sequence[int], seed: str) -> np.ndarray:
    """Return as many random neurons in each layer, all of them others."""
    starts = np.cumsum([0, *widths])
    layers, _ = locate_index(widths, neurons)
    generator, taken = random.Random(seed), set(neurons.tolist())
    drawn = [
        neuron
        for layer, count in sorted(Counter(layers.tolist()).items())
        for neuron in generator.sample([n for n in range(starts[layer], starts[layer + 1]) if n not in taken], count)
    ]
    return np.array(drawn)


def measure(model: LoadedModel, data: Data, concept: str, sets: dict, images: int) -> tuple[dict, np.ndarray]:
    """Return (own noun, other nouns, size of the change of other nouns) of each set, and untouched log-probabilities."""
    generator = random.Random(concept)
    own, named = data.of(concept), data.named
    others = [sample for sample in data.samples if named[sample.sample_id] and concept not in named[sample.sample_id]]
    chosen = [generator.sample(part, min(images, len(part))) for part in (own, others)]
    ((items, batch),) = ShardAnalysis(
        model, data.settings.model_copy(update={"batch_size": 64}), data.nouns, 0
    ).encoded([*chosen[0], *chosen[1]])
    places = places_of(items, batch)
    is_own = np.array([place.concept == concept for place in places])
    is_other = np.array([place.sample_id in {sample.sample_id for sample in chosen[1]} for place in places])
    ablator = Ablator(model, batch, places)
    found = {}
    for name, neurons in sets.items():
        layers, units = locate_index(model.widths, neurons)
        fall = -ablator.change(list(zip(layers.tolist(), units.tolist(), strict=True))).numpy()
        found[name] = (fall[is_own].mean(), fall[is_other].mean(), np.abs(fall[is_other]).mean())
    untouched = ablator.untouched.numpy()
    return found, np.array([untouched[is_own].mean(), untouched[is_other].mean()])


def interval(values: np.ndarray, statistic, rounds: int = 2000) -> str:
    """Return the 95 % bootstrap interval of a statistic of the concepts' rows."""
    generator = np.random.default_rng(0)
    drawn = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(rounds)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{low:.3g} to {high:.3g}"


def concepts_of(located: Data, fresh: Data, images: int) -> dict[str, list[str]]:
    """Return both halves of the concepts that have the images, most frequent first."""
    known = sorted(set().union(*located.named.values()))
    enough = [c for c in known if len(located.of(c)) >= images + 2 and len(fresh.of(c)) >= images]
    halves = {"tuned": enough[::2], "shown": enough[1::2]}
    return {name: sorted(half, key=lambda c: -len(located.of(c))) for name, half in halves.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo", help="where neurons are ranked")
    parser.add_argument("--fresh", default=str(mmray.demo.EVALUATION), help="where effects are measured")
    parser.add_argument("--half", choices=("shown", "tuned"), default="shown")
    parser.add_argument("--concepts", type=int, default=44)
    parser.add_argument("--images", type=int, default=3, help="own, and as many others, measured for each concept")
    parser.add_argument("--located", type=int, default=5, help="images of each concept that neurons are ranked on")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    arguments = parser.parse_args()
    began = time.perf_counter()
    model, data = load(arguments.model), read(arguments.model, arguments.data)
    fresh = read(arguments.model, arguments.fresh, data.nouns)
    halves = concepts_of(data, fresh, arguments.images)
    concepts = halves[arguments.half][: arguments.concepts]
    # What other nouns feel is learnt on both halves' images: no measured image is among them.
    chosen = {s.sample_id: s for half in halves.values() for c in half for s in data.of(c)[: arguments.located]}
    methods = {name: METHODS[name] for name in arguments.methods}
    merges = locate(model, data, list(chosen.values()), {(m.score, m.folded) for m in methods.values()})
    ranked = time.perf_counter()
    falls, untouched = defaultdict(list), []
    for concept in concepts:
        sets = {}
        for name, method in methods.items():
            order = highest(merges[method.score, method.folded], concept, method.by, max(arguments.sizes))
            for size in arguments.sizes:
                sets[name, size] = order[:size]
                if method.control:
                    sets[f"  random, same layers as {name}", size] = alike(order[:size], model.widths, concept)
        found, plain = measure(model, fresh, concept, sets, arguments.images)
        untouched.append(plain)
        for key, values in found.items():
            falls[key].append(values)
    print(
        f"{arguments.model}: {len(concepts)} concepts of the half {arguments.half!r}, ranked on {len(chosen)} images, "
        f"{arguments.images} own and {arguments.images} other fresh images each; "
        "untouched log p {:.3f} own, {:.3f} other".format(*np.mean(untouched, axis=0))
    )
    print(
        f"{'':48s}{'K':>4s}{'own':>8s}{'interval':>18s}{'other':>8s}{'interval':>20s}{'|other|':>9s}{'ratio':>7s}  interval"
    )
    for (name, size), rows in sorted(falls.items(), key=lambda row: -row[0][1] if False else row[0][1]):
        values = np.array(rows)
        own, other, change = values.mean(axis=0)
        print(
            f"{name:48s}{size:4d}{own:8.3f}{interval(values, lambda v: v[:, 0].mean()):>18s}"
            f"{other:8.3f}{interval(values, lambda v: v[:, 1].mean()):>20s}{change:9.3f}{own / other:7.1f}  "
            + interval(values, lambda v: v[:, 0].mean() / v[:, 1].mean())
        )
    print(f"{ranked - began:.0f} s to rank, {time.perf_counter() - ranked:.0f} s to measure")


if __name__ == "__main__":
    main()
