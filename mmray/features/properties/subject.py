"""A concept under study: its ranked neurons, a batch of its own images and others, and every neuron's scores there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmray.data.samples import Failure, Sample
from mmray.features.census.ranking import locate_index
from mmray.features.census.settings import CensusSettings
from mmray.features.census.shard import Captioned, ShardAnalysis
from mmray.features.census.written_tokens import written_tokens
from mmray.models.blocks import BlockRecorder, permuted_image
from mmray.models.pixels import BUDGET
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.concepts import NounSource
from mmray.neurons.model import NeuronModel
from mmray.neurons.scoring import score_batch, score_captured
from mmray.neurons.token_positions import TokenPosition, positions_of

Neurons = Sequence[tuple[int, int]]
TOO_LARGE = f"the concept's images have more than {BUDGET:,} pixels together"
"""Reason that an image is left out of a concept's batch."""


@dataclass(frozen=True)
class Ranked:
    """A concept's neurons in one ranking of the run, highest first, with the sign of each one's mean activation."""

    neurons: tuple[tuple[int, int], ...]
    signs: tuple[float, ...]


@dataclass(frozen=True)
class ConceptInputs:
    """What the plan chose for one concept; samples are named by their ids."""

    concept: str
    token: str
    """The scored token of its first occurrence."""
    language: str | None
    ranked: Mapping[str, Ranked]
    """Ranking → the concept's neurons."""
    paired: Ranked
    """Neurons of another concept: the control of text and image similarity."""
    own: tuple[str, ...]
    """Samples that show the concept; empty if only heat maps are drawn."""
    others: tuple[str, ...]
    """Samples without the concept."""
    maps: tuple[str, ...]
    """Samples with heat maps."""


@dataclass(frozen=True)
class Study:
    """The model, settings and decoded neurons that all concepts of a run share."""

    model: NeuronModel
    settings: CensusSettings
    nouns: NounSource
    decoded: pa.Table
    """The tokens that each neuron promotes and suppresses (`tokens`, `suppressed`), over all layers in order."""

    def indices(self, neurons: Neurons) -> list[int]:
        """Return the indices of neurons over all layers."""
        starts = np.cumsum([0, *self.model.widths]).tolist()
        return [starts[layer] + unit for layer, unit in neurons]

    def locate(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return (layer, unit) of neurons, given their indices over all layers."""
        layer, unit = locate_index(self.model.widths, np.array(indices, np.int64))
        return list(zip(layer.tolist(), unit.tolist(), strict=True))

    def written_tokens(self, indices: Sequence[int], signs: Sequence[float]) -> list[list[str]]:
        """Return the ten tokens that each neuron writes with an activation of this sign."""
        found: list[list[str]] = written_tokens(self.decoded, indices, signs).to_pylist()
        return found

    def batches(self, samples: Sequence[Sample]) -> Iterator[tuple[list[Captioned], Batch]]:
        """Yield batches of the samples with images, encoded as in the census."""
        yield from self._analysis(self.settings.batch_size).encoded(_with_image(samples))

    def encoded(
        self, samples: Sequence[Sample], leave_out: Callable[[Failure], None] = lambda _: None
    ) -> tuple[list[Captioned], Batch] | None:
        """Return the samples with images in one batch; None if none of them can be used.

        Calls `leave_out` for each sample that is not in it. If the images have more than BUDGET pixels together, only
        the largest of their batches is returned.
        """
        analysis = self._analysis(max(1, len(samples)))
        largest: tuple[list[Captioned], Batch] | None = None
        for items, batch in analysis.encoded(_with_image(samples)):
            smaller = items
            # A batch that is split can't be compared within one forward pass, so the larger part stands for the
            # concept.
            if largest is None or len(items) > len(largest[0]):
                smaller, largest = largest[0] if largest else [], (items, batch)
            for item in smaller:
                leave_out(Failure(item.sample.sample_id, item.sample.source, "encode", TOO_LARGE))
        for failure in analysis.failures:
            leave_out(failure)
        return largest

    def _analysis(self, batch_size: int) -> ShardAnalysis:
        # Reuses the census's decoding and encoding, so that images and prompts are the same as there.
        settings = self.settings.model_copy(update={"batch_size": batch_size})
        return ShardAnalysis(self.model, settings, self.nouns, 0)


def _with_image(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.image is not None]


class Subject:
    """One concept, the batch of its images and others, and lazily what one plain forward pass shows there.

    `positions` are one position of the concept per image, and all nouns of images without it.
    """

    def __init__(self, study: Study, inputs: ConceptInputs, items: list[Captioned], batch: Batch) -> None:
        self.study, self.inputs, self.items, self.batch = study, inputs, items, batch
        self.model = study.model
        found = positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items])
        own_samples = set(inputs.own)
        # Only the first mention in a caption counts, so that every image has the same weight.
        first = {position.sample_id: position for position in reversed(found) if position.concept == inputs.concept}
        # Other nouns count only in images without the concept, where it can't influence them.
        without = {position.sample_id for position in found} - own_samples - first.keys()
        self.positions: list[TokenPosition] = [
            position for position in found if first.get(position.sample_id) is position or position.sample_id in without
        ]

    @cached_property
    def own(self) -> Bool[Tensor, " position"]:
        """Which positions are the concept's."""
        return torch.tensor([position.concept == self.inputs.concept for position in self.positions], dtype=torch.bool)

    @property
    def usable(self) -> bool:
        """Whether there are two images of the concept, and one of others."""
        return int(self.own.sum()) > 1 and not bool(self.own.all())

    @cached_property
    def own_samples(self) -> list[str]:
        """The sample of each of the concept's positions."""
        return [position.sample_id for position in self.positions if position.concept == self.inputs.concept]

    @cached_property
    def other_samples(self) -> list[str]:
        """The sample of each position of another noun."""
        return [position.sample_id for position in self.positions if position.concept != self.inputs.concept]

    @cached_property
    def forward_pass(self) -> tuple[ActivationCache, BlockRecorder]:
        """Activations of a plain forward pass at the positions, and the states of its blocks."""
        recorder = BlockRecorder(self.model)
        with (
            torch.inference_mode(),
            recorder.recording(),
            cache_activations(self.model, self.batch, self.positions) as cache,
        ):
            forward(self.model, self.batch)
        return cache, recorder

    @cached_property
    def permuted_pass(self) -> ActivationCache:
        """Activations at the positions of a forward pass with the image's patches in another order."""
        with (
            torch.inference_mode(),
            permuted_image(self.model, self.batch),
            cache_activations(self.model, self.batch, self.positions) as cache,
        ):
            forward(self.model, self.batch)
        return cache

    def scores(
        self, score: str = "contribution", *, folded: bool = False, permuted: bool = False
    ) -> Float[Tensor, "position neuron"]:
        """Return every neuron's score at the positions, over all layers in order."""
        cache = self.permuted_pass if permuted else self.forward_pass[0]
        found = score_captured(self.model, cache, score, folded=folded)
        return torch.cat([part.cpu() for part in found.scores], dim=1)

    def gradients(self, *, permuted: bool = False) -> Float[Tensor, "own neuron"]:
        """Return every neuron's gradient × activation, summed over the image, at the concept's positions."""
        # The backward pass is expensive, so it runs on the concept's own images only.
        own = set(self.own_samples)
        part = self.of_samples(own)
        with permuted_image(self.model, part.batch) if permuted else nullcontext():
            found = score_batch(self.model, part.batch, part.positions, "gradient")
        scores = torch.cat([each.cpu() for each in found.scores], dim=1)
        order = [part.own_samples.index(name) for name in self.own_samples]
        return scores[order]

    def of_samples(self, sample_ids: Collection[str]) -> Subject:
        """Return the same concept on some of these samples alone."""
        encoded = self.study.encoded([item.sample for item in self.items if item.sample.sample_id in sample_ids])
        assert encoded is not None
        return Subject(self.study, self.inputs, *encoded)

    @cached_property
    def halves(self) -> tuple[Subject, Subject]:
        """The same concept on every second image, and on the others; images without it are split, too."""
        own, others = self.own_samples, list(dict.fromkeys(self.other_samples))
        # A single image without the concept serves both.
        parts = [others[number::2] or others for number in (0, 1)]
        first, second = (self.of_samples({*own[number::2], *parts[number]}) for number in (0, 1))
        return first, second

    @cached_property
    def contributions(self) -> Float[Tensor, "position neuron"]:
        """Every neuron's contribution at the positions."""
        return self.scores()

    @cached_property
    def own_activations(self) -> Float[Tensor, "own neuron"]:
        """Every neuron's activation at the concept's positions, over all layers in order."""
        found = self.forward_pass[0].activations
        return torch.cat([found[layer].cpu()[self.own] for layer in range(len(self.model.widths))], dim=1)

    def written_here(self, indices: Sequence[int]) -> list[list[str]]:
        """Return the tokens that neurons write, by the sign of their mean activation at the concept's positions."""
        return self.study.written_tokens(indices, self.own_activations[:, indices].mean(dim=0).tolist())

    @cached_property
    def mean_magnitudes(self) -> list[Float[Tensor, " neuron"]]:
        """Mean absolute activation of every neuron at the concept's positions, per layer."""
        return list(torch.split(self.own_activations.abs().mean(dim=0), list(self.model.widths)))
