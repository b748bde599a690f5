"""What an edit should do, settled before its method runs: the answers to change and to keep, and the neurons."""

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
from mmray.neurons.model import NeuronModel

TARGET_IMAGES = 16
"""Kept images that show each target, so that captions of the target itself stay too."""


@dataclass(frozen=True)
class Task:
    """What an edit should do."""

    model: NeuronModel
    settings: EditSettings
    purposes: tuple[Purpose, ...]
    neurons: list[Neuron]
    new: list[Example]
    """Answers that the model should give."""
    keep: list[Example]
    """Answers that it should go on giving."""


def prepare(dataset: EditDataset, requests: Sequence[EditSettings]) -> Task:
    """Settle what an edit for all requests is learned from, and which neurons it may change.

    Raises InputError for a concept that the run does not know or the model never says.
    """
    if requests[0].reduce_hallucination:
        return _hallucination_task(dataset, requests[0])
    return _rewording_task(dataset, requests)


def _rewording_task(dataset: EditDataset, requests: Sequence[EditSettings]) -> Task:
    """Settle an edit that replaces words by others."""
    model, run = dataset.model, dataset.run
    settings = requests[0]
    layers = last_layers(model, settings.layers)
    # A dict as an ordered set: requests may share neurons, and a neuron has one row.
    neurons: dict[Neuron, None] = {}
    new: list[Example] = []
    purposes, sources, target_samples = [], [], []
    for request in requests:
        source, target = request.concept, request.new_word
        neurons |= dict.fromkeys(located(run, source, request.neuron_limit, layers, request.by))
        examples = replaced(dataset, source, target, request.samples, request.seed)
        new += examples
        kind = "noise" if request.method == "noise" else "suppress" if request.suppress else "swap"
        samples, images = _made_on(dataset, examples)
        purposes.append(Purpose(kind, source, target, language=request.language, samples=samples, images=images))
        sources.append(source)
        target_samples += one_per_image(dataset.ids([target]), dataset.images)[:TARGET_IMAGES]
    # Images of the targets first, because `kept` takes only the beginning of this list.
    first = list(dict.fromkeys([*target_samples, *sharing(run, list(neurons))]))
    keep = kept(dataset, sources, settings.kept, settings.seed, first)
    return Task(model, settings, tuple(purposes), list(neurons), new, keep)


def _hallucination_task(dataset: EditDataset, settings: EditSettings) -> Task:
    """Settle an edit that removes from captions what is not in the image."""
    found = hallucinations(dataset, settings.samples, settings.kept, settings.seed)
    layers = last_layers(dataset.model, settings.layers)
    # Not by a run's ranking, whose occurrences of a word may be right or wrong.
    neurons = contrasting(dataset.model, found.new, found.without_guarded_word, settings.neuron_limit, layers)
    samples, images = _made_on(dataset, found.new)
    purpose = Purpose("hallucination", pairs=found.pairs, language=settings.language, samples=samples, images=images)
    return Task(dataset.model, settings, (purpose,), neurons, found.new, [*found.guards, *found.keep])


def _made_on(dataset: EditDataset, examples: Sequence[Example]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of the examples' samples, and the digests of their images."""
    samples = tuple(dict.fromkeys(example.sample_id for example in examples))
    digests = (image_digest(dataset.samples[name].image) for name in samples)
    return samples, tuple(dict.fromkeys(digest for digest in digests if digest is not None))
