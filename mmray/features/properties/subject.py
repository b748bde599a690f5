"""A concept under study: its neurons as the run ranks them, its images and others' in one batch, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmray.data.samples import Failure, Sample
from mmray.features.census.decoding import written_tokens
from mmray.features.census.settings import CensusSettings
from mmray.features.census.shard import Captioned, ShardAnalysis
from mmray.models.blocks import BlockRecorder
from mmray.models.pixels import BUDGET
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.concepts import NounSource
from mmray.neurons.model import NeuronModel
from mmray.neurons.scoring import score_captured
from mmray.neurons.token_positions import TokenPosition, places_of

Neurons = Sequence[tuple[int, int]]
TOO_LARGE = f"with the concept's other images more than {BUDGET:,} pixels"
"""Why an image is left out of a concept's batch."""


@dataclass(frozen=True)
class Ranked:
    """A concept's neurons in one order of the run, highest first, with the sign of each one's mean activation."""

    neurons: tuple[tuple[int, int], ...]
    signs: tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """What the run knows of a concept; `paired` are the highest neurons of another one."""

    concept: str
    token: str
    language: str | None
    ranked: Mapping[str, Ranked]
    paired: Ranked
    own: tuple[str, ...]
    others: tuple[str, ...]
    maps: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What all concepts of a run share."""

    model: NeuronModel
    settings: CensusSettings
    nouns: NounSource
    decoded: pa.Table
    """What each neuron promotes and suppresses (`tokens`, `suppressed`), over all layers in order."""

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first neuron of each layer."""
        return [sum(self.model.widths[:layer]) for layer in range(len(self.model.widths))]

    def numbers(self, neurons: Neurons) -> list[int]:
        """Return neurons as numbers over all layers."""
        return [self.starts[layer] + unit for layer, unit in neurons]

    def names(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Return numbers over all layers as (layer, unit)."""
        found = []
        for number in numbers:
            layer = max(layer for layer, start in enumerate(self.starts) if start <= number)
            found.append((layer, number - self.starts[layer]))
        return found

    def written(self, numbers: Sequence[int], signs: Sequence[float]) -> list[list[str]]:
        """Return the ten tokens that each of these neurons writes by activation of these signs."""
        found: list[list[str]] = written_tokens(self.decoded, numbers, signs).to_pylist()
        return found

    def batches(self, samples: Sequence[Sample], size: int | None = None) -> Iterator[tuple[list[Captioned], Batch]]:
        """Yield the samples that have images in batches, as a census encodes them; of its size, unless one is given."""
        yield from self._analysis(size or self.settings.batch_size).encoded(_pictured(samples))

    def encoded(
        self, samples: Sequence[Sample], leave_out: Callable[[Failure], None] = lambda _: None
    ) -> tuple[list[Captioned], Batch] | None:
        """Return the samples that have images in one batch; None where none of them can be used.

        `leave_out` is told of each that is not in it. Images of more than BUDGET pixels are several batches, of which
        the largest stands for all.
        """
        analysis = self._analysis(max(1, len(samples)))
        largest: tuple[list[Captioned], Batch] | None = None
        for items, batch in analysis.encoded(_pictured(samples)):
            smaller = items
            if largest is None or len(items) > len(largest[0]):
                smaller, largest = largest[0] if largest else [], (items, batch)
            for item in smaller:
                leave_out(Failure(item.sample.sample_id, item.sample.source, "encode", TOO_LARGE))
        for failure in analysis.failures:
            leave_out(failure)
        return largest

    def _analysis(self, batch_size: int) -> ShardAnalysis:
        settings = self.settings.model_copy(update={"batch_size": batch_size})
        return ShardAnalysis(self.model, settings, self.nouns, 0)


def _pictured(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.image is not None]


class Subject:
    """One concept with its batch."""

    def __init__(self, study: Study, facts: Facts, items: list[Captioned], batch: Batch) -> None:
        self.study, self.facts, self.items, self.batch = study, facts, items, batch
        self.model = study.model
        found = places_of(batch, [(item.sample.sample_id, item.mentions) for item in items])
        own_samples = set(facts.own)
        # A concept's first place in a caption stands for the image; other nouns are those of images without it.
        first = {place.sample_id: place for place in reversed(found) if place.concept == facts.concept}
        self.places: list[TokenPosition] = [
            place
            for place in found
            if first.get(place.sample_id) is place
            or (place.sample_id not in own_samples and place.sample_id not in first and place.concept != facts.concept)
        ]

    @cached_property
    def own(self) -> Bool[Tensor, " place"]:
        """Which places are the concept's."""
        return torch.tensor([place.concept == self.facts.concept for place in self.places], dtype=torch.bool)

    @property
    def usable(self) -> bool:
        """Return whether there are two images of the concept, and one of others."""
        return int(self.own.sum()) > 1 and not bool(self.own.all())

    @cached_property
    def own_samples(self) -> list[str]:
        """The images of the concept's places."""
        return [place.sample_id for place in self.places if place.concept == self.facts.concept]

    @cached_property
    def other_samples(self) -> list[str]:
        """The image of each place of another noun."""
        return [place.sample_id for place in self.places if place.concept != self.facts.concept]

    @cached_property
    def plain(self) -> tuple[ActivationCache, BlockRecorder]:
        """What a plain forward shows at the places, and the way that it took through the blocks."""
        passage = BlockRecorder(self.model)
        with (
            torch.inference_mode(),
            passage.recording(),
            cache_activations(self.model, self.batch, self.places) as captured,
        ):
            forward(self.model, self.batch)
        return captured, passage

    def scores(self, score: str = "contribution", *, folded: bool = False) -> Float[Tensor, "place neuron"]:
        """Return every neuron's score at the places, over all layers in order."""
        found = score_captured(self.model, self.plain[0], score, folded=folded)
        return torch.cat([part.cpu() for part in found.scores], dim=1)

    @cached_property
    def contributions(self) -> Float[Tensor, "place neuron"]:
        """Every neuron's contribution at the places."""
        return self.scores()

    @cached_property
    def signed(self) -> Float[Tensor, "own neuron"]:
        """Every neuron's activation at the concept's places, over all layers in order."""
        found = self.plain[0].activations
        return torch.cat([found[layer].cpu()[self.own] for layer in range(len(self.model.widths))], dim=1)

    def written_here(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return the tokens that neurons write at the concept, by the sign of their mean activation at its places."""
        return self.study.written(numbers, self.signed[:, numbers].mean(dim=0).tolist())

    @cached_property
    def activations(self) -> list[Float[Tensor, " neuron"]]:
        """Mean magnitude of every neuron at the concept's places, by layer."""
        found = self.plain[0].activations
        return [found[layer].cpu()[self.own].abs().mean(dim=0) for layer in range(len(self.model.widths))]


def with_captions(samples: Sequence[Sample], captions: Mapping[str, str]) -> list[Sample]:
    """Return the samples with the captions that the run scored."""
    return [replace(sample, caption=captions[sample.sample_id]) for sample in samples]
