"""What happens to words when a concept's neurons are zeroed, made noisy or amplified, and when others are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import DECODED, FACTORS, MOST, RANKINGS, SIGMAS, SIZES
from mmray.features.properties.subject import Neurons, Subject
from mmray.models.interventions import ablate, add_noise, by_layer, scale
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows
from mmray.models.prompting import Batch
from mmray.neurons import controls
from mmray.neurons.ablation import Ablator
from mmray.neurons.token_positions import TokenPosition

MATCHED, LIKE, UNIFORM = "layer-matched", "activation-matched", "uniform"


class AblationEffects:
    """One concept's images, with the places of nouns, of every token, and of the concept's token at other nouns.

    `resumes` is what an earlier concept's `ablator` has shown of the model.
    """

    def __init__(self, subject: Subject, resumes: bool | None = None) -> None:
        self.subject = subject
        self.concept = subject.facts.concept
        nouns = subject.places
        others = [place for place in nouns if place.concept != self.concept]
        token = next(place.token for place in nouns if place.concept == self.concept)
        named = [TokenPosition(place.row, place.position, token, self.concept, place.sample_id) for place in others]
        rows = {place.row: place.sample_id for place in others}
        words = [place for row, name in rows.items() for place in every_token(subject.batch, row, name)]
        self.ablator = Ablator(
            subject.model, subject.batch, [*nouns, *named, *words], subject.plain[1], resumes=resumes
        )
        self.bounds = [0, len(nouns), len(nouns) + len(named), len(self.ablator.places)]
        self.other_samples = [place.sample_id for place in others]
        self.word_samples = [place.sample_id for place in words]

    def sets(self, size: int) -> dict[str, Neurons]:
        """Return the neurons of both rankings and of the controls, which small doses of random neurons need not be."""
        subject = self.subject
        ranked = subject.facts.ranked
        found: dict[str, Neurons] = {name: ranked[name].neurons[:size] for name in RANKINGS}
        seed = f"{self.concept} {size}"
        if size >= DECODED:
            found[MATCHED] = controls.layer_matched(subject.model.widths, found["score"], seed)
        if size == MOST:
            found[LIKE] = controls.activation_matched(subject.activations, found["score"], seed)
            found[UNIFORM] = controls.uniform(subject.model.widths, found["score"], seed)
        return found

    def falls(self, neurons: Neurons, change: AbstractContextManager[None]) -> list[Float[Tensor, " place"]]:
        """Return by how much a change lowers probabilities: of nouns, of the concept where others are due, of words.

        Of words it is the log-probability, in nats.
        """
        before = self.ablator.untouched
        after = before + self.ablator.changed(neurons, change)
        parts = [slice(start, stop) for start, stop in pairwise(self.bounds)]
        return [before[part].exp() - after[part].exp() for part in parts[:2]] + [(before - after)[parts[2]]]

    def observe(self, found: Observations) -> None:
        """Observe every dose of every change."""
        subject = self.subject
        own = subject.own
        probabilities = self.ablator.untouched[: self.bounds[1]].exp()
        key = Key("causal", "p_untouched", "none")
        found.extend(key, self.concept, subject.own_samples, probabilities[own].tolist())
        for size in SIZES:
            for method, neurons in self.sets(size).items():
                falls = self.falls(neurons, ablate(subject.model, neurons))
                self._nouns(found, "zeroed", method, size, None, falls)
                if size == MOST:
                    key = Key("causal", "zeroed_perplexity", method, size)
                    found.extend(key, self.concept, self.word_samples, falls[2].tolist())
        most = self.sets(MOST)
        for method in ("score", MATCHED):
            neurons = most[method]
            # The control at the largest dose alone: it stands for the smaller ones.
            for sigma in SIGMAS if method == "score" else SIGMAS[-1:]:
                falls = self.falls(neurons, noise(subject.model, neurons, sigma))
                self._nouns(found, "noise", method, MOST, sigma, falls)
            for factor in FACTORS if method == "score" else FACTORS[-1:]:
                falls = self.falls(neurons, scale(subject.model, neurons, factor))
                self._nouns(found, "amplified", method, MOST, factor, falls)

    def _nouns(
        self,
        found: Observations,
        change: str,
        method: str,
        size: int,
        strength: float | None,
        falls: list[Float[Tensor, " place"]],
    ) -> None:
        own = self.subject.own
        named, values = (self.subject.own_samples, falls[0][own])
        if change == "amplified":
            named, values = self.other_samples, -falls[1]
        keys = [Key("causal", f"{change}_{part}", method, size, strength) for part in ("own", "other")]
        found.extend(keys[0], self.concept, named, values.tolist())
        found.extend(keys[1], self.concept, self.other_samples, falls[0][~own].tolist())


def noise(model: LoadedModel, neurons: Neurons, sigma: float) -> AbstractContextManager[None]:
    """Return the block in which these neurons' rows have noise of `sigma` times their own root mean square."""
    rows = [
        output_rows(model.network, model.projections[layer])[torch.tensor(units)].float().flatten()
        for layer, units in by_layer(model, neurons).items()
    ]
    size = torch.cat([part.cpu() for part in rows]).square().mean().sqrt()
    return add_noise(model, neurons, sigma * float(size))


def every_token(batch: Batch, row: int, sample_id: str) -> list[TokenPosition]:
    """Return the place of every token of a row's caption."""
    start = batch.caption_start[row]
    return [TokenPosition(row, start + at - 1, token, "", sample_id) for at, token in enumerate(batch.tokens[row])]
