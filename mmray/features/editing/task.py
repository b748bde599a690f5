"""What an edit should do, settled before its method runs: the answers to change and to keep, and the neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmray.data.image_keys import one_per_image
from mmray.data.samples import image_digest
from mmray.features.editing.baselines import whole_layers
from mmray.features.editing.before_edit import BeforeEdit
from mmray.features.editing.dataset import EditDataset, Example, replaced
from mmray.features.editing.deltas import Neuron
from mmray.features.editing.divergence import contrasting
from mmray.features.editing.edit import Purpose
from mmray.features.editing.edit_methods import EDIT_METHODS
from mmray.features.editing.kept_answers import HELD_OUT, KeptAnswers, images_to_keep, kept, kept_answers
from mmray.features.editing.locating import last_layers, located, probed, sharing
from mmray.features.editing.reduction_samples import hallucinations
from mmray.features.editing.resumed_forward import recorded
from mmray.features.editing.settings import EditSettings
from mmray.features.editing.whitening import Curvature
from mmray.neurons.model import NeuronModel

MOST = 2048
"""Neurons of the largest try: whitening takes time that grows with their third power."""
TARGET_IMAGES = 16
"""Kept images that show each target, so that captions of the target itself stay too."""


@dataclass(frozen=True)
class Opening:
    """How easily a patched neuron writes its word."""

    share: float
    """Of what the word's positions reach, at which it opens."""
    margin: float
    """Logits by which the new word must lead on the edit's images, also to suppress another. Where the old word is less
    clear than there, the neuron opens less, and the lead is smaller."""


OPENINGS, FIRST_OPENING = (Opening(0.8, 15.0), Opening(0.55, 15.0), Opening(0.35, 15.0), Opening(0.35, 60.0)), 1
"""Those to try, from the one that changes least, and the number of the first."""


@dataclass(frozen=True)
class Task:
    """What an edit should do."""

    model: NeuronModel
    settings: EditSettings
    purposes: tuple[Purpose, ...]
    neurons: list[Neuron]
    """Those that it may change, the most important first."""
    new: list[Example]
    """Answers that the model should give."""
    held_out: list[Example]
    """Such answers for images that nothing is learned from."""
    kept: KeptAnswers
    """Answers that it should go on giving."""
    curvature: Curvature
    """What changes cost these."""
    before: BeforeEdit = field(default_factory=BeforeEdit)
    """What tries share."""
    opening: int = FIRST_OPENING
    """Of a patch, in this try: a number of OPENINGS."""


def prepare(dataset: EditDataset, requests: Sequence[EditSettings]) -> Task:
    """Settle what an edit for all requests is learned from, and which neurons it may change.

    Raises InputError for a concept that the run does not know or the model never says.
    """
    if requests[0].reduce_hallucination:
        return _hallucination_task(dataset, requests[0])
    return _rewording_task(dataset, requests)


def settle(
    model: NeuronModel,
    settings: EditSettings,
    purposes: tuple[Purpose, ...],
    neurons: list[Neuron],
    new: list[Example],
    held_out: list[Example],
    kept: KeptAnswers,
) -> Task:
    """Return the task with what its tries share: recorded answers, and the curvature of what is kept."""
    if settings.layers == 1:
        # Each try, its whitening and its validation go through the same answers.
        new, held_out = recorded(model, new), recorded(model, held_out)
        parts = ({kind: recorded(model, part[kind]) for kind in part} for part in (kept.learned, kept.held_out))
        kept = KeptAnswers(*parts)
    curvature = Curvature(model, kept.learned, settings.weights, settings.seed)
    return Task(model, settings, purposes, neurons, new, held_out, kept, curvature)


def _rewording_task(dataset: EditDataset, requests: Sequence[EditSettings]) -> Task:
    """Settle an edit that replaces words by others."""
    model, run = dataset.model, dataset.run
    settings = requests[0]
    layers = last_layers(model, settings.layers)
    # A dict as an ordered set: requests may share neurons, and a neuron has one row.
    neurons: dict[Neuron, None] = {}
    new: list[Example] = []
    held_out: list[Example] = []
    purposes, sources, target_samples = [], [], []
    for request in requests:
        source, target = request.concept, request.new_word
        neurons |= dict.fromkeys(located(run, source, request.neuron_limit, layers, request.by))
        examples, others = without_some_images(replaced(dataset, source, target, request.samples, request.seed))
        new += examples
        held_out += others
        kind = "noise" if request.method == "noise" else "suppress" if request.suppress else "swap"
        samples, images = _made_on(dataset, examples)
        purposes.append(Purpose(kind, source, target, language=request.language, samples=samples, images=images))
        sources.append(source)
        target_samples += one_per_image(dataset.ids([target]), dataset.images)[:TARGET_IMAGES]
    # Images of the targets first, because `kept` takes only the beginning of this list.
    first = list(dict.fromkeys([*target_samples, *map(dataset.name, sharing(run, list(neurons)))]))
    captions = kept(dataset, sources, images_to_keep(model, settings), settings.seed, first)
    words = [word for purpose in purposes for word in (purpose.source, purpose.target) if word]
    keep = kept_answers(dataset, captions, words, settings.keep_text, settings.seed)
    if settings.searches:
        # A larger try, and one of several words, has other ranked neurons too, and then all others of these layers.
        each = MOST // len(requests)
        ranked = [one for request in requests for one in located(run, request.concept, each, layers, request.by)]
        most = max(MOST, len(neurons))
        found = dict.fromkeys([*neurons, *ranked, *whole_layers(model, layers)])
        neurons = dict.fromkeys(list(found)[:most])
    return settle(model, settings, tuple(purposes), list(neurons), new, held_out, keep)


def _hallucination_task(dataset: EditDataset, settings: EditSettings) -> Task:
    """Settle an edit that removes from captions what is not in the image."""
    found = hallucinations(dataset, settings.samples, images_to_keep(dataset.model, settings), settings.seed)
    layers = last_layers(dataset.model, settings.layers)
    if settings.by == "probe":
        # Less of what is written more at true mentions would not reduce what is wrong.
        raised = EDIT_METHODS[settings.method].closed_form
        neurons = probed(dataset.run, settings.neuron_limit, layers, raised=raised)
    else:
        # Not by a run's ranking, whose occurrences of a word may be right or wrong.
        neurons = contrasting(dataset.model, found.new, found.without_guarded_word, settings.neuron_limit, layers)
    samples, images = _made_on(dataset, found.new)
    purpose = Purpose("hallucination", pairs=found.pairs, language=settings.language, samples=samples, images=images)
    words = list(purpose.unwanted)
    keep = kept_answers(dataset, [*found.guards, *found.keep], words, settings.keep_text, settings.seed)
    return settle(dataset.model, settings, (purpose,), neurons, found.new, [], keep)


def without_some_images(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Return the examples in two parts: those to learn from, and those of every HELD_OUT-th image."""
    images = list(dict.fromkeys(example.sample_id for example in examples))
    held_out = set(images[HELD_OUT - 1 :: HELD_OUT])
    return (
        [example for example in examples if example.sample_id not in held_out],
        [example for example in examples if example.sample_id in held_out],
    )


def _made_on(dataset: EditDataset, examples: Sequence[Example]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of the examples' samples, and the digests of their images."""
    samples = tuple(dict.fromkeys(example.sample_id for example in examples))
    digests = (image_digest(dataset.samples[name].image) for name in samples)
    return samples, tuple(dict.fromkeys(digest for digest in digests if digest is not None))
