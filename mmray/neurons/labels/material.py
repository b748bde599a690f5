"""Texts that a model is made to read, teacher-forced: the captions of samples, and the answers to their questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.datasets.images import decode_image
from mmray.datasets.samples import Sample
from mmray.models.capture import tap_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.places import Place
from mmray.neurons.scoring import forward


@dataclass(frozen=True)
class Said:
    """What stands behind a prompt: a sample's caption, or the answer to one of its questions."""

    sample_id: str
    label: str
    image: bytes | None
    prompt: str
    tokens: list[int]
    offsets: list[tuple[int, int]]


def label_of(sample: Sample, by: str) -> str | None:
    """Return a sample's language, domain, or other label."""
    return {"language": sample.language, "domain": sample.domain, **sample.labels}.get(by)


def captions_of(model: LoadedModel, samples: Iterable[Sample], by: str, prompt: str | None) -> list[Said]:
    """Return the captions of samples that have the label; one that no token is made of is left out."""
    return [
        said
        for sample in samples
        if (said := _said(model, sample, by, prompt, sample.language, sample.caption)) is not None
    ]


def answers_of(model: LoadedModel, samples: Iterable[Sample], by: str, count: int) -> list[Said]:
    """Return the answers to the first `count` questions of samples that have the label."""
    return [
        said
        for sample in samples
        for question, answer in (sample.questions or ())[:count]
        if (said := _said(model, sample, by, question, None, answer)) is not None
    ]


def _said(
    model: LoadedModel, sample: Sample, by: str, prompt: str | None, language: str | None, text: str
) -> Said | None:
    label = label_of(sample, by)
    if label is None or not text.strip():
        return None
    before = prompt_text(model, prompt, language, image=sample.image is not None)
    tokens, offsets = tokenize_caption(model, before, text)
    return Said(sample.sample_id, label, sample.image, before, tokens, offsets) if tokens else None


def batches(model: LoadedModel, texts: Iterable[Said], size: int) -> Iterator[tuple[list[Said], Batch]]:
    """Yield batches of like length, those with an image and those without apart.

    Raises ValueError where an image can't be decoded: a run's own samples could be.
    """
    ordered = sorted(texts, key=lambda said: (said.image is None, said.prompt, len(said.tokens), said.sample_id))
    for _, group in groupby(ordered, key=lambda said: said.image is None):
        alike = list(group)
        for start in range(0, len(alike), size):
            some = alike[start : start + size]
            images = [None if said.image is None else decode_image(said.image) for said in some]
            prompts = [said.prompt for said in some]
            yield some, encode(model, prompts, images, [s.tokens for s in some], [s.offsets for s in some])


def token_places(batch: Batch, texts: Sequence[Said]) -> list[Place]:
    """Return the places that predict the tokens of each row's text, row by row."""
    return [
        Place(row, batch.caption_start[row] + number - 1, token, said.label, said.sample_id)
        for row, said in enumerate(texts)
        for number, token in enumerate(batch.tokens[row])
    ]


@torch.inference_mode()
def read(model: LoadedModel, batch: Batch, places: Sequence[Place]) -> Float[Tensor, "place 2"]:
    """Run a batch; return of each place the nats that its token costs, and 1 where it is the likeliest."""
    states: list[Tensor] = []
    with tap_input(model.norm, states.append):
        forward(model, batch)
    rows = torch.tensor([place.row * batch.positions + place.position for place in places])
    tokens = torch.tensor([place.token for place in places])
    hidden = states[-1].flatten(0, -2)
    logits = vocabulary_logits(model, hidden[rows.to(hidden.device)]).cpu()
    costs = -logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    return torch.stack([costs, (logits.argmax(dim=1) == tokens).float()], dim=1)


def by_text(places: Sequence[Place]) -> list[slice]:
    """Return the part of the places that belongs to each row."""
    found, start = [], 0
    for _, group in groupby(places, key=lambda place: place.row):
        stop = start + len(list(group))
        found.append(slice(start, stop))
        start = stop
    return found
