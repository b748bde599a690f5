"""Texts that a model is made to read, teacher-forced: the captions of samples, and the answers to their questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.data.images import decode_image
from mmray.data.samples import BACKGROUND, Sample
from mmray.errors import ShardError
from mmray.features.census.settings import CensusSettings
from mmray.features.census.shard import prefix_given
from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.activation_cache import forward
from mmray.neurons.split_on_oom import split_on_failure
from mmray.neurons.token_positions import TokenPosition

Result = TypeVar("Result")


@dataclass(frozen=True)
class Said:
    """What stands behind a prompt: a sample's caption, or the answer to one of its questions."""

    sample_id: str
    label: str
    image: bytes | None
    prompt: str
    tokens: list[int]
    offsets: list[tuple[int, int]]
    background: str = BACKGROUND
    """Colour behind the image's transparent pixels."""


def label_of(sample: Sample, by: str) -> str | None:
    """Return a sample's language, domain, or other label."""
    return {"language": sample.language, "domain": sample.domain, **sample.labels}.get(by)


def captions_of(model: LoadedModel, samples: Iterable[Sample], by: str, census: CensusSettings) -> list[Said]:
    """Return the captions of samples that have the label, behind what they stood behind at the census.

    One that no token is made of is left out.
    """

    def before(sample: Sample) -> str:
        prefix = prefix_given(census, sample.caption)
        return prompt_text(model, census.prompt, sample.language, image=sample.image is not None, prefix=prefix)

    return [
        said for sample in samples if (said := _said(model, sample, by, before(sample), sample.caption)) is not None
    ]


def answers_of(model: LoadedModel, samples: Iterable[Sample], by: str, count: int) -> list[Said]:
    """Return the answers to the first `count` questions of samples that have the label."""

    def before(sample: Sample, question: str) -> str:
        return prompt_text(model, question, None, image=sample.image is not None)

    return [
        said
        for sample in samples
        for question, answer in (sample.questions or ())[:count]
        if (said := _said(model, sample, by, before(sample, question), answer)) is not None
    ]


def _said(model: LoadedModel, sample: Sample, by: str, before: str, text: str) -> Said | None:
    label = label_of(sample, by)
    if label is None or not text.strip():
        return None
    tokens, offsets = tokenize_caption(model, before, text)
    return Said(sample.sample_id, label, sample.image, before, tokens, offsets, sample.background) if tokens else None


def in_batches(
    model: LoadedModel, texts: Iterable[Said], size: int, work: Callable[[Sequence[Said], Batch], Result]
) -> list[Result]:
    """Return what the work gives of batches of like length, those with an image and those without apart.

    A batch that can't be done, for memory or for images of different sizes, is done in halves. Raises ShardError for a
    text that can't be done alone: a run's own samples could be.
    """

    def encoded(some: Sequence[Said]) -> Result:
        images = [None if said.image is None else decode_image(said.image, said.background) for said in some]
        prompts = [said.prompt for said in some]
        return work(
            some, encode(model, prompts, images, [said.tokens for said in some], [said.offsets for said in some])
        )

    ordered = sorted(texts, key=lambda said: (said.image is None, said.prompt, len(said.tokens), said.sample_id))
    groups = [list(group) for _, group in groupby(ordered, key=lambda said: said.image is None)]
    parts = (
        part
        for alike in groups
        for part in within_budget(alike, lambda said: pixels_of(model, said.image), BUDGET, size)
    )
    return [done for part in parts for done in split_on_failure(part, encoded, _refuse)]


def _refuse(said: Said, problem: str) -> None:
    raise ShardError(f"sample {said.sample_id}: {problem}")


def token_places(batch: Batch, texts: Sequence[Said]) -> list[TokenPosition]:
    """Return the places that predict the tokens of each row's text, row by row."""
    return [
        TokenPosition(row, batch.caption_start[row] + number - 1, token, said.label, said.sample_id)
        for row, said in enumerate(texts)
        for number, token in enumerate(batch.tokens[row])
    ]


@torch.inference_mode()
def read(model: LoadedModel, batch: Batch, places: Sequence[TokenPosition]) -> Float[Tensor, "place 2"]:
    """Run a batch; return of each place the nats that its token costs, and 1 where it is the likeliest."""
    states: list[Tensor] = []
    with capture_input(model.norm, states.append):
        forward(model, batch)
    rows = torch.tensor([place.row * batch.positions + place.position for place in places])
    tokens = torch.tensor([place.token for place in places])
    hidden = states[-1].flatten(0, -2)
    logits = vocabulary_logits(model, hidden[rows.to(hidden.device)]).cpu()
    costs = -logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    return torch.stack([costs, (logits.argmax(dim=1) == tokens).float()], dim=1)


def by_text(places: Sequence[TokenPosition]) -> list[slice]:
    """Return the part of the places that belongs to each row."""
    found, start = [], 0
    for _, group in groupby(places, key=lambda place: place.row):
        stop = start + len(list(group))
        found.append(slice(start, stop))
        start = stop
    return found
