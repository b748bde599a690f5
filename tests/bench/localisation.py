"""Do the located neurons matter: `python -m tests.bench.localisation --model MODEL [--concepts N]`.

For every method the K highest neurons of each concept are zeroed at all positions, and the concept's noun is read in
its own images, the other nouns in images without it: mean fall of the log-probability in nats, with 95 % bootstrap
intervals over concepts, and the ratio of the two. Neurons are ranked on DATA, and measured on images that no ranking
has seen (`--fresh`). A control zeroes random neurons, as many in each layer as the method named.

Concepts are cut into two halves, by turns of the alphabet. What `joint` was tuned on is in the half `tuned`; the
figures to quote are those of the half `shown`.

    python -m tests.bench.localisation --model demo
    python -m tests.bench.localisation --model MODEL --sizes 50 --dtype bf16
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from numpy import ndarray

import mmray.demo
from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.features.census.concept_merge import ConceptMerge
from mmray.features.census.inputs import open_data
from mmray.features.census.ranking import locate_index, selective_scores, specific_scores
from mmray.features.census.reduction import ConceptSums
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.features.select.effects import CandidateEffects
from mmray.models.loading import DTYPES, LoadedModel, load
from mmray.neurons.ablation import Ablator
from mmray.neurons.concepts import NounSource, noun_source
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.scoring import ablation_effects, score_batch, score_captured
from mmray.neurons.token_positions import positions_of

SIZES = (10, 50, 100)
"""Neurons zeroed."""
CANDIDATES = 600
"""Neurons a concept that `joint` chooses from: the highest by selective effect."""


@dataclass(frozen=True)
class Method:
    """One way of ranking: by which score of the census, and by which order of its neurons."""

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
    "selective effect": Method("effect", by="selective"),
    "joint effect": Method("effect", by="joint", control=True),
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

    def analysis(self, model: LoadedModel, batch_size: int) -> ShardAnalysis:
        """Return what encodes samples as a census does."""
        return ShardAnalysis(model, self.settings.model_copy(update={"batch_size": batch_size}), self.nouns, 0)


def read(model: str, data: str, nouns: NounSource | None = None) -> Data:
    """Return the English samples of a data set."""
    settings = census_settings({"model": model, "data": data, "out": "unused"})
    source = open_data(settings)
    files = source.files()
    rows = sum(file.rows for file in files)
    found = [row for row in read_shard(source, cut(files, rows, rows).shards[0]) if isinstance(row, Sample)]
    english = [sample for sample in found if (sample.language or "en").startswith("en")]
    return Data(settings, english, nouns or noun_source("auto", source.objects_vocabulary(), source.translations()))


class Located:
    """The sums of a census for every score that a method wants, and the effects at every place."""

    def __init__(self, model: LoadedModel, data: Data, samples: Sequence[Sample], methods: Sequence[Method]) -> None:
        self.model = model
        self.seen: list[tuple] = []
        wanted = {(method.score, method.folded) for method in methods}
        sums = {key: ConceptSums(model.widths, sum(model.widths)) for key in wanted}
        self.seconds = 0.0
        """Of a core, forward and backward for `effect`: what `mmray select` does with a scene."""
        for items, batch in data.analysis(model, 8).encoded(samples):
            places = positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items])
            concepts = [place.concept for place in places]
            # One forward for all scores but the published gradient.
            before = time.process_time()
            products, captured = gradient_pass(model, batch, places, "effect")
            effects = ablation_effects(model, captured, products)
            self.seconds += time.process_time() - before
            direct = score_captured(model, captured, "contribution", folded=True)
            self.seen.append((concepts, products, effects, direct.log_prob))
            for (score, folded), collected in sums.items():
                if score == "effect":
                    scores = effects
                elif score == "gradient":
                    scores = score_batch(model, batch, places, score).scores
                else:
                    scores = score_captured(model, captured, score, folded=folded).scores
                collected.add(concepts, scores, direct.activation)
        self.merged = {key: ConceptMerge(sum(model.widths)) for key in wanted}
        for key, collected in sums.items():
            self.merged[key].add(*collected.tables())
        self.scores = {
            key: {name: add_up() for concepts in merge.ranges() for name, add_up in concepts}
            for key, merge in self.merged.items()
        }

    def highest(self, method: Method, concept: str, sizes: Sequence[int]) -> dict[int, ndarray]:
        """Return the concept's first neurons, numbered over all layers, by how many."""
        if method.by != "joint":
            order = self._order(method.score, method.folded, method.by, concept)
            return {size: order[:size] for size in sizes}
        effects = CandidateEffects({concept: self._order("effect", False, "selective", concept)[:CANDIDATES]})
        for batch in self.seen:
            effects.add_columns(*batch)
        return {size: np.array(effects.choose(concept, size)) for size in sizes}

    def _order(self, score: str, folded: bool, by: str, concept: str) -> ndarray:
        merge = self.merged[score, folded]
        scores = self.scores[score, folded][concept]
        values = {
            "score": lambda: scores.score,
            "specific": lambda: specific_scores(scores, merge.total, merge.n),
            "selective": lambda: selective_scores(scores, merge.total_squares, merge.n),
        }[by]()
        return np.lexsort((scores.neuron, -values))


def alike(neurons: ndarray, widths: Sequence[int], seed: str) -> ndarray:
    """Return as many random neurons in each layer, none of these among them."""
    starts, (layers, _) = np.cumsum([0, *widths]), locate_index(widths, neurons)
    generator, taken = random.Random(seed), set(neurons.tolist())
    drawn = (
        generator.sample([n for n in range(starts[layer], starts[layer + 1]) if n not in taken], count)
        for layer, count in sorted(Counter(layers.tolist()).items())
    )
    return np.array(list(chain.from_iterable(drawn)))


def measure(
    model: LoadedModel, data: Data, concept: str, sets: Mapping[object, ndarray], images: int
) -> tuple[dict[object, ndarray], ndarray]:
    """Return the fall of the own noun, of others, and how far these moved; and both untouched log-probabilities."""
    generator, named = random.Random(concept), data.named
    others = [sample for sample in data.samples if named[sample.sample_id] and concept not in named[sample.sample_id]]
    own, other = (generator.sample(part, min(images, len(part))) for part in (data.of(concept), others))
    ((items, batch),) = data.analysis(model, 2 * images).encoded([*own, *other])
    places = positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items])
    is_own = np.array([place.concept == concept for place in places])
    elsewhere = {sample.sample_id for sample in other}
    is_other = np.array([place.sample_id in elsewhere for place in places])
    ablator, found = Ablator(model, batch, places), {}
    for name, neurons in sets.items():
        layers, units = locate_index(model.widths, neurons)
        ablated = list(zip(layers.tolist(), units.tolist(), strict=True))
        fall = -ablator.changed(ablated, mmray.ablate(model, ablated)).numpy()
        found[name] = np.array([fall[is_own].mean(), fall[is_other].mean(), np.abs(fall[is_other]).mean()])
    untouched = ablator.unchanged.numpy()
    return found, np.array([untouched[is_own].mean(), untouched[is_other].mean()])


def halves_of(located: Data, fresh: Data, images: int) -> dict[str, list[str]]:
    """Return both halves of the concepts that have enough images, most frequent first."""
    known = sorted(set().union(*located.named.values()))
    enough = [c for c in known if len(located.of(c)) >= images + 2 and len(fresh.of(c)) >= images]
    halves = {"tuned": enough[::2], "shown": enough[1::2]}
    return {name: sorted(half, key=lambda c: -len(located.of(c))) for name, half in halves.items()}


def interval(values: ndarray, statistic: Callable[[ndarray], float], rounds: int = 2000) -> str:
    """Return the 95 % bootstrap interval of a statistic of the concepts' rows."""
    generator = np.random.default_rng(0)
    drawn = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(rounds)]
    return "{:.3g} to {:.3g}".format(*np.percentile(drawn, [2.5, 97.5]))


def show(falls: Mapping[tuple[str, int], Sequence[ndarray]]) -> None:
    """Print a line a method and size."""
    print(f"{'zeroed':44s}{'K':>4s}{'own':>8s}{'':22s}{'other':>8s}{'':24s}{'|other|':>8s}{'own/other':>11s}")
    for (name, size), rows in falls.items():
        values = np.array(rows)
        own, other, moved = values.mean(axis=0)
        columns = (
            f"{own:8.3f} ({interval(values, lambda v: v[:, 0].mean())})".ljust(30),
            f"{other:8.3f} ({interval(values, lambda v: v[:, 1].mean())})".ljust(32),
            f"{moved:8.3f}{own / other:11.1f} ({interval(values, lambda v: v[:, 0].mean() / v[:, 1].mean())})",
        )
        print(f"{name:44s}{size:4d}", *columns, sep="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo", help="where neurons are ranked")
    parser.add_argument("--fresh", default=str(mmray.demo.EVALUATION), help="where effects are measured")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--half", choices=("shown", "tuned"), default="shown")
    parser.add_argument("--concepts", type=int, default=44)
    parser.add_argument("--images", type=int, default=3, help="own, and as many others, measured for each concept")
    parser.add_argument("--located", type=int, default=8, help="images of each concept that neurons are ranked on")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.set_grad_enabled(False)
    model, data = load(arguments.model, arguments.dtype), read(arguments.model, arguments.data)
    fresh = read(arguments.model, arguments.fresh, data.nouns)
    concepts = halves_of(data, fresh, arguments.images)[arguments.half][: arguments.concepts]
    chosen = {sample.sample_id: sample for c in concepts for sample in data.of(c)[: arguments.located]}
    methods = {name: METHODS[name] for name in arguments.methods}
    located = Located(model, data, list(chosen.values()), list(methods.values()))
    ranked = time.perf_counter()
    falls: dict[tuple[str, int], list[ndarray]] = defaultdict(list)
    untouched = []
    for concept in concepts:
        sets: dict[tuple[str, int], ndarray] = {}
        for name, method in methods.items():
            for size, neurons in located.highest(method, concept, arguments.sizes).items():
                sets[name, size] = neurons
                if method.control:
                    sets[f"  random, same layers as {name}", size] = alike(neurons, model.widths, concept)
        found, plain = measure(model, fresh, concept, sets, arguments.images)
        untouched.append(plain)
        for key in sorted(found, key=lambda key: arguments.sizes.index(key[1])):
            falls[key].append(found[key])
    print(
        f"{arguments.model}: {len(concepts)} concepts of the half {arguments.half!r}, ranked on {len(chosen)} images, "
        f"measured on {arguments.images} own and {arguments.images} other images each\n"
        "untouched log-probability: {:.3f} own, {:.3f} other".format(*np.mean(untouched, axis=0))
    )
    show(falls)
    print(f"{located.seconds / len(chosen):.2f} s of a core per scene, forward and backward")
    print(f"{ranked - began:.0f} s to rank, {time.perf_counter() - ranked:.0f} s to choose and measure")


if __name__ == "__main__":
    main()
