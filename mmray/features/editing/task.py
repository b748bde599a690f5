"""What an edit is to do, settled before any method begins: answers that change and stay, and the neurons located."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmray.data.image_keys import one_per_image
from mmray.data.samples import image_digest
from mmray.features.editing.dataset import EditDataset, Example, kept, replaced
from mmray.features.editing.deltas import Neuron
from mmray.features.editing.divergence import contrasting
from mmray.features.editing.edit import Purpose
from mmray.features.editing.locating import last_layers, located, sharing
from mmray.features.editing.reduction_samples import hallucinations
from mmray.features.editing.settings import EditSettings

FEWEST_OF_TARGET = 16
"""Images of the target among those whose captions are to stay: what they show."""


@dataclass(frozen=True)
class Task:
    """What an edit is to do, settled."""

    material: EditDataset
    settings: EditSettings
    purposes: tuple[Purpose, ...]
    neurons: list[Neuron]
    new: list[Example]
    keep: list[Example]


def prepare(material: EditDataset, wishes: Sequence[EditSettings]) -> Task:
    """Settle what an edit for all the wishes is learnt on and which neurons it may change.

    Raises InputError for a concept that the run does not know or the model never says.
    """
    return _correct(material, wishes[0]) if wishes[0].reduce_hallucination else _reword(material, wishes)


def _reword(material: EditDataset, wishes: Sequence[EditSettings]) -> Task:
    """Settle edits that have words take the place of others."""
    model, run = material.model, material.run
    settings = wishes[0]
    layers = last_layers(model, settings.layers)
    neurons: dict[Neuron, None] = {}
    new: list[Example] = []
    purposes, sources, targets = [], [], []
    for wish in wishes:
        source, target = wish.concept, wish.instead
        neurons |= dict.fromkeys(located(run, source, wish.most, layers, wish.by))
        examples = replaced(material, source, target, wish.samples, wish.seed)
        new += examples
        kind = "noise" if wish.method == "noise" else "suppress" if wish.suppress else "swap"
        samples, images = _learnt_on(material, examples)
        purposes.append(Purpose(kind, source, target, language=wish.language, samples=samples, images=images))
        sources.append(source)
        targets += one_per_image(material.ids([target]), material.images)[:FEWEST_OF_TARGET]
    first = list(dict.fromkeys([*targets, *sharing(run, list(neurons))]))
    keep = kept(material, sources, settings.kept, settings.seed, first)
    return Task(material, settings, tuple(purposes), list(neurons), new, keep)


def _correct(material: EditDataset, settings: EditSettings) -> Task:
    """Settle an edit that takes from captions what is not in the image."""
    found = hallucinations(material, settings.samples, settings.kept, settings.seed)
    layers = last_layers(material.model, settings.layers)
    neurons = contrasting(material.model, found.new, found.others, settings.most, layers)
    samples, images = _learnt_on(material, found.new)
    purpose = Purpose("hallucination", pairs=found.pairs, language=settings.language, samples=samples, images=images)
    return Task(material, settings, (purpose,), neurons, found.new, [*found.guards, *found.keep])


def _learnt_on(material: EditDataset, examples: Sequence[Example]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of the examples' samples, and the digests of their images."""
    samples = tuple(dict.fromkeys(example.sample_id for example in examples))
    digests = (image_digest(material.samples[name].image) for name in samples)
    return samples, tuple(dict.fromkeys(digest for digest in digests if digest is not None))
