"""Methods of finding neurons, compared by every property, on images that did not rank the neurons.

A concept's images are split into halves. Each half ranks the neurons that are measured on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.properties.effects import AblationEffects, noise
from mmray.features.properties.meaning import Clip, clip_scores, similarities
from mmray.features.properties.measures import (
    common_share,
    highest,
    lemma_hit,
    overlap,
    pairwise_jaccard,
    placements,
    set_mean,
    specific_order,
    writing_share,
)
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import DECODED, MOST, SIGMAS
from mmray.features.properties.subject import Subject
from mmray.models.capture import has_gates
from mmray.models.encoder import Encoder
from mmray.models.interventions import ablate

METHODS = ("contribution", "folded", "specific", "gate", "activation", "gradient", "random")
"""Scores that rank the neurons. `folded` includes the final norm; `specific` subtracts the contribution elsewhere.

There is no `gradient` if the decoder's sequence holds no image, because it sums over the image's positions. There is no
`gate` if the model's gates can't be read.
"""


@dataclass(frozen=True)
class Comparison:
    """The methods on one concept."""

    subject: Subject
    again: Subject | None
    """Its images with the captions that the model writes about their permuted patches."""
    found: Observations
    encoder: Encoder | None = None
    clip: Clip | None = None

    def observe(self, resumes: bool) -> None:
        """Measure the neurons of every method. `resumes` is what an `AblationEffects` found for the model."""
        halves = self.subject.halves
        effects = [AblationEffects(half, resumes) for half in halves]
        model = self.subject.model
        # Methods that this family can't have are left out, not measured as zero.
        missing = {
            "gradient": not model.parts.image_in_sequence,
            "gate": not has_gates(model.network, model.projections),
        }
        for method in METHODS:
            if missing.get(method):
                continue
            scores = [own_scores(half, method) for half in halves]
            self._invariance(method, scores)
            orders = [ranking(half, method, own) for half, own in zip(halves, scores, strict=True)]
            written = []
            # Reversed: neurons that one half ranks are measured on the other.
            for ranker, order, measured in zip(halves, orders, reversed(effects), strict=True):
                indices = order.topk(min(MOST, len(order))).indices.tolist()
                written.append(ranker.written_here(indices[:DECODED]))
                self._effects(method, measured, indices)
                self._specificity(method, measured.subject, indices[:DECODED])
                if self.clip is not None:
                    key = Key("comparison", "clipscore", method, DECODED)
                    clip_scores(measured.subject, self.found, self.clip, key, written[-1])
            self._sensitivity(method, written)

    def _add(self, measure: str, method: str, size: int, samples: list[str], values: list[float]) -> None:
        self.found.extend(Key("comparison", measure, method, size), self.subject.inputs.concept, samples, values)

    def _sensitivity(self, method: str, written: list[list[list[str]]]) -> None:
        """Measure whether the ten highest neurons write the noun: the mean of both halves, one value per concept."""
        inputs = self.subject.inputs
        noun = inputs.concept, inputs.token, inputs.language
        values = [
            {
                "lemma_hit_rate": float(lemma_hit(chain.from_iterable(tokens), *noun)),
                "inference_score": writing_share(tokens, *noun),
                **(similarities(self.encoder, tokens, inputs.concept) if self.encoder is not None else {}),
            }
            for tokens in written
        ]
        for measure in values[0]:
            mean = sum(half[measure] for half in values) / len(values)
            self._add(measure, method, DECODED, [inputs.concept], [mean])

    def _invariance(self, method: str, scores: list[Float[Tensor, "own neuron"]]) -> None:
        """Measure whether an image's ten highest neurons are those of other images, and with its patches permuted."""
        halves, again = self.subject.halves, self.again
        samples = [name for half in halves for name in half.own_samples]
        sets = highest(torch.cat(scores), DECODED)
        self._add("jaccard", method, DECODED, samples, pairwise_jaccard(sets))
        self._add("common_share", method, DECODED, [self.subject.inputs.concept], [common_share(sets)])
        # Random scores depend on the place alone, so they would be the same with permuted patches.
        if method == "random" or not self.subject.model.parts.image_in_sequence:
            return
        moved = highest(torch.cat([own_scores(half, method, permuted=True) for half in halves]), DECODED)
        self._add("overlap", method, DECODED, samples, list(map(overlap, sets, moved)))
        if again is not None:
            before = dict(zip(samples, sets, strict=True))
            new_sets = highest(own_scores(again, method, permuted=True), DECODED)
            values = [overlap(before[name], one) for name, one in zip(again.own_samples, new_sets, strict=True)]
            self._add("overlap_regenerated", method, DECODED, again.own_samples, values)

    def _specificity(self, method: str, measured: Subject, indices: list[int]) -> None:
        """Measure whether the neurons give more to the concept's noun than to others."""
        means = set_mean(measured.contributions, torch.tensor(indices))
        own, others = placements(means[measured.own], means[~measured.own])
        self._add("auroc", method, DECODED, measured.own_samples, own.tolist())
        # As in `specificity`: deviations of the other side only widen the interval.
        key = Key("comparison", "auroc", method, DECODED)
        for sample_id, value in zip(measured.other_samples, others.tolist(), strict=True):
            self.found.add(key, self.subject.inputs.concept, sample_id, value, of=0.0)

    def _effects(self, method: str, measured: AblationEffects, indices: list[int]) -> None:
        """Measure what happens to the noun and to others when the neurons are zeroed, or made noisy."""
        half = measured.subject
        model, neurons = half.model, half.study.locate(indices)
        for change, context in (("zeroed", ablate(model, neurons)), ("noise", noise(model, neurons, max(SIGMAS)))):
            falls = measured.falls(neurons, context)[0]
            self._add(f"{change}_own", method, MOST, half.own_samples, falls[half.own].tolist())
            self._add(f"{change}_other", method, MOST, half.other_samples, falls[~half.own].tolist())


def own_scores(subject: Subject, method: str, *, permuted: bool = False) -> Float[Tensor, "own neuron"]:
    """Return a method's score of every neuron at the concept's positions."""
    if method == "gradient":
        return subject.gradients(permuted=permuted)
    folded = method == "folded"
    score = "contribution" if method in ("folded", "specific") else method
    return subject.scores(score, folded=folded, permuted=permuted)[subject.own]


def ranking(subject: Subject, method: str, scores: Float[Tensor, "own neuron"]) -> Float[Tensor, " neuron"]:
    """Return the values by which a method ranks neurons, given its scores at the concept's positions."""
    return specific_order(subject.contributions, subject.own) if method == "specific" else scores.mean(dim=0)
