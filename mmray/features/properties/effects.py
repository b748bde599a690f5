"""Effects on the probabilities of words when a concept's neurons, or controls, are zeroed, made noisy or amplified."""

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

LAYER_MATCHED, ACTIVATION_MATCHED, UNIFORM = "layer-matched", "activation-matched", "uniform"


class AblationEffects:
    """Effects of changes at three groups of positions of one concept's images.

    These are the nouns; the concept's token in place of other nouns; and every token of images without the concept.
    `resumes` takes the value that an earlier concept's `ablator` found for the model, so that it is checked once.
    """

    def __init__(self, subject: Subject, resumes: bool | None = None) -> None:
        self.subject = subject
        self.concept = subject.inputs.concept
        nouns = subject.positions
        others = [noun for noun in nouns if noun.concept != self.concept]
        token = next(noun.token for noun in nouns if noun.concept == self.concept)
        replaced = [TokenPosition(noun.row, noun.position, token, self.concept, noun.sample_id) for noun in others]
        # Whole captions are read once per image, however many nouns they have.
        rows = {noun.row: noun.sample_id for noun in others}
        words = [position for row, name in rows.items() for position in every_token(subject.batch, row, name)]
        positions = [*nouns, *replaced, *words]
        self.ablator = Ablator(subject.model, subject.batch, positions, subject.forward_pass[1], resumes=resumes)
        # Where each of the three groups begins and ends among the positions, which all share a forward.
        self.bounds = [0, len(nouns), len(nouns) + len(replaced), len(positions)]
        self.other_samples = [noun.sample_id for noun in others]
        self.word_samples = [position.sample_id for position in words]

    def sets(self, size: int) -> dict[str, Neurons]:
        """Return the `size` highest neurons of both rankings, and the controls of that size."""
        subject = self.subject
        ranked = subject.inputs.ranked
        found: dict[str, Neurons] = {name: ranked[name].neurons[:size] for name in RANKINGS}
        seed = f"{self.concept} {size}"
        # Small random sets are skipped to save forward passes.
        if size >= DECODED:
            found[LAYER_MATCHED] = controls.layer_matched(subject.model.widths, found["score"], seed)
        if size == MOST:
            found[ACTIVATION_MATCHED] = controls.activation_matched(subject.mean_magnitudes, found["score"], seed)
            found[UNIFORM] = controls.uniform(subject.model.widths, found["score"], seed)
        return found

    def falls(self, neurons: Neurons, change: AbstractContextManager[None]) -> list[Float[Tensor, " position"]]:
        """Return how much a change lowers the probability at each of the three groups of positions.

        For every token, the third group, it is the log-probability in nats.
        """
        before = self.ablator.unchanged
        after = before + self.ablator.changed(neurons, change)
        parts = [slice(start, stop) for start, stop in pairwise(self.bounds)]
        return [before[part].exp() - after[part].exp() for part in parts[:2]] + [(before - after)[parts[2]]]

    def observe(self, found: Observations) -> None:
        """Measure every change at every size and strength."""
        subject = self.subject
        own = subject.own
        probabilities = self.ablator.unchanged[: self.bounds[1]].exp()
        key = Key("causal", "p_untouched", "none")
        found.extend(key, self.concept, subject.own_samples, probabilities[own].tolist())
        # Sizes share the untouched pass; each change resumes from the first block that it affects.
        for size in SIZES:
            for method, neurons in self.sets(size).items():
                falls = self.falls(neurons, ablate(subject.model, neurons))
                self._nouns(found, "zeroed", method, size, None, falls)
                if size == MOST:
                    key = Key("causal", "zeroed_perplexity", method, size)
                    found.extend(key, self.concept, self.word_samples, falls[2].tolist())
        largest = self.sets(MOST)
        for method in ("score", LAYER_MATCHED):
            neurons = largest[method]
            # The control runs at the largest strength only; it stands for the smaller ones.
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
        falls: list[Float[Tensor, " position"]],
    ) -> None:
        own = self.subject.own
        samples, values = self.subject.own_samples, falls[0][own]
        if change == "amplified":
            # The concept's own noun is likely already; amplification shows where other nouns are due.
            samples, values = self.other_samples, -falls[1]
        own_key, other_key = (Key("causal", f"{change}_{part}", method, size, strength) for part in ("own", "other"))
        found.extend(own_key, self.concept, samples, values.tolist())
        found.extend(other_key, self.concept, self.other_samples, falls[0][~own].tolist())


def noise(model: LoadedModel, neurons: Neurons, sigma: float) -> AbstractContextManager[None]:
    """Return a context in which these neurons' rows of W_out have noise of `sigma` times their own RMS."""
    rows = [
        output_rows(model.network, model.projections[layer])[torch.tensor(units)].float().flatten()
        for layer, units in by_layer(model, neurons).items()
    ]
    rms = torch.cat([part.cpu() for part in rows]).square().mean().sqrt()
    return add_noise(model, neurons, sigma * float(rms))


def every_token(batch: Batch, row: int, sample_id: str) -> list[TokenPosition]:
    """Return the position of every token of a row's caption."""
    start = batch.caption_start[row]
    return [TokenPosition(row, start + at - 1, token, "", sample_id) for at, token in enumerate(batch.tokens[row])]
