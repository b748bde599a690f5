"""Edits of neurons from a single record: which answers to change and to keep, and which neurons write the old one.

`mmray edit` replaces a word in all captions that name it. A record asks for one answer, `alt`, to one prompt about one
image. The neurons to edit are located on the record itself: by their contribution, where the new answer departs from
the model's own, to the token that the model says there, minus that to the new one. One forward pass gives all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mmray.data.samples import Sample, image_digest
from mmray.features.editing.augmentation import views
from mmray.features.editing.dataset import EditDataset, Example, Prompt, departing
from mmray.features.editing.divergence import contrasting
from mmray.features.editing.edit import Purpose, WeightEdit
from mmray.features.editing.kept_answers import ASKED, HELD_OUT, KeptAnswers, kept, kept_answers
from mmray.features.editing.locating import last_layers
from mmray.features.editing.methods import make_task_edit
from mmray.features.editing.resumed_forward import recorded
from mmray.features.editing.settings import EditSettings
from mmray.features.editing.task import MOST, Task, settle
from mmray.features.mmedit.settings import MmeditSettings
from mmray.models.options import LONGEST
from mmray.models.prompting import prompt_text, tokenize_caption
from mmray.neurons.model import NeuronModel

VIEWS = 3
"""Crops of a record's image that the answer is learned on as well; one more is held out."""


@dataclass(frozen=True)
class RecordTask:
    """A record, with what an edit of it needs."""

    name: str
    question: str
    target: str
    image: bytes
    others: frozenset[str]
    """Digests of all images that the record names: no edit may learn from what it is measured on."""


class Session:
    """A model, and what its edits must leave alone: what it says of a run's images, and without any image.

    Replies are those of the unedited model, so no edit may be in place when `asked` meets a question first.
    """

    def __init__(self, dataset: EditDataset, settings: MmeditSettings) -> None:
        self.dataset = dataset
        self.settings = settings
        self._asked: tuple[str, list[Example]] | None = None

    @property
    def model(self) -> NeuronModel:
        """The model."""
        return self.dataset.model

    @cached_property
    def base(self) -> KeptAnswers:
        """What must stay whatever the record: captions, answers about their images, text-only replies, texts."""
        settings = self.settings
        captions = kept(self.dataset, [], settings.kept, settings.seed)
        return kept_answers(self.dataset, captions, [], settings.keep_text, settings.seed)

    def asked(self, question: str) -> list[Example]:
        """Return the model's replies to a record's prompt, about other images and without any."""
        # The last question alone: the replies to thousands of them would fill the memory.
        if self._asked is None or self._asked[0] != question:
            shown = [one for one in self.base.every if one.image is not None and one.sample_id][:ASKED]
            text = prompt_text(self.model, question, "en")
            queries = [Prompt(text, one.image, one.background) for one in shown]
            queries.append(Prompt(prompt_text(self.model, question, "en", image=False)))
            self._asked = question, self.dataset.replies(queries, LONGEST)
        return self._asked[1]

    def kept_for(self, record: RecordTask, own: Sequence[int]) -> KeptAnswers:
        """Return what an edit of a record must leave alone.

        Left out are images that the record names, and replies equal to the one that is to change.
        """
        asked = self.asked(record.question)
        learned, held_out = dict(self.base.learned), dict(self.base.held_out)
        # Every HELD_OUT-th reply is only checked afterwards; the others are learned from.
        learned["answers"] = [*learned["answers"], *(one for n, one in enumerate(asked) if (n + 1) % HELD_OUT)]
        held_out["answers"] = [*held_out["answers"], *asked[HELD_OUT - 1 :: HELD_OUT]]

        def stays(one: Example) -> bool:
            # `own` is without its end token, which a reply has.
            same = bool(own) and one.tokens[: len(own)] == tuple(own) and len(one.tokens) <= len(own) + 1
            return not (one.image is not None and (same or image_digest(one.image) in record.others))

        return KeptAnswers(
            *(
                {kind: [one for one in some if stays(one)] for kind, some in part.items()}
                for part in (learned, held_out)
            )
        )


@dataclass
class PreparedRecord:
    """A record's answers, and what methods share."""

    record: RecordTask
    own: tuple[int, ...]
    """The tokens of what the model, as it is, answers."""
    examples: tuple[Example, ...]
    """The record itself, then crops of its image."""
    edited: bool = False
    """Whether earlier edits are in place."""
    task: Task | None = None
    """Settled by the first method that edits neurons: all share its curvature."""

    @property
    def answered(self) -> bool:
        """Whether the model gives the target already, so that there is nothing to edit."""
        return self.examples[0].rejected is None


def prepare_record(session: Session, record: RecordTask, *, edited: bool = False) -> PreparedRecord:
    """Return a record with the model's own answers; `edited` if earlier edits are in place."""
    dataset, model = session.dataset, session.model
    prompt = prompt_text(model, record.question, "en")
    sample = Sample(record.name, record.name, record.image, record.target)
    # Crops alone: in a mirrored image, left is right.
    crops = [views(sample, session.settings.seed + number)[1] for number in range(VIEWS + 1)]
    queries = [Prompt(prompt, one.image, one.background) for one in (sample, *crops)]
    tokens = tokenize_caption(model, prompt, record.target)[0]
    examples, replies = [], []
    for query, own in zip(queries, dataset.replies(queries, LONGEST), strict=True):
        # Without the end token, which a reply that was cut off does not have.
        said = own.tokens[: len(own.tokens) - (own.tokens[-1:] == dataset.end)]
        replies.append(said)
        new = Example(prompt, query.image, (*tokens, *dataset.end), sample_id=record.name, background=query.background)
        examples.append(departing(dataset, said, new))
    return PreparedRecord(record, replies[0], tuple(examples), edited)


def edit_neurons(session: Session, prepared: PreparedRecord, method: str) -> WeightEdit:
    """Edit neurons by a method of `mmray edit`, on the record and crops of its image."""
    began = time.perf_counter()
    if prepared.task is None:
        prepared.task = _task(session, prepared)
    settings = prepared.task.settings.model_copy(update={"method": method})
    task = replace(prepared.task, settings=settings)
    if not settings.searches:
        # Only the search for a larger edit takes more neurons.
        task = replace(task, neurons=task.neurons[: settings.neuron_limit])
    wish: dict[str, Any] = {"record": prepared.record.name, **settings.model_dump()}
    return make_task_edit(task, {"wishes": [wish]}, began)


def _task(session: Session, prepared: PreparedRecord) -> Task:
    """Settle what all methods learn from; the neurons are the highest of the last layer, as in `mmray edit`."""
    record, model = prepared.record, session.model
    options = session.settings.model_dump(include={"neurons", "kept", "keep_text", "steps", "seed"})
    settings = EditSettings(source=record.question, target=record.target, **options)
    new, held_out = list(prepared.examples[:-1]), [prepared.examples[-1]]
    # Located on the record alone; its crops are only learned on.
    neurons = contrasting(model, prepared.examples[:1], [], MOST, last_layers(model, settings.layers))
    purpose = Purpose("swap", session.dataset.text(prepared.own), record.target, samples=(record.name,))
    kept_here = session.kept_for(record, prepared.own)
    if prepared.edited:
        # What is recorded of them was before the edits that are now in place.
        kept_here = KeptAnswers(*(_fresh(model, part) for part in (kept_here.learned, kept_here.held_out)))
    return settle(model, settings, (purpose,), neurons, new, held_out, kept_here)


def _fresh(model: NeuronModel, part: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    return {kind: recorded(model, [replace(one, cache=None) for one in some]) for kind, some in part.items()}
