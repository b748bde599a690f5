"""Labelled texts that the model reads teacher-forced: captions of samples, and answers to their questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from mmray.models.prompting import POSITIONS, Batch, encode, prompt_text, tokenize_caption
from mmray.neurons.activation_cache import forward
from mmray.neurons.split_on_oom import split_on_failure
from mmray.neurons.token_positions import TokenPosition

LOGITS_AT_ONCE = 512
"""Positions whose logits over the whole vocabulary are held at a time."""

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True)
class LabelledText:
    """A text after its prompt: a sample's caption, or the answer to one of its questions."""

    sample_id: str
    label: str
    image: bytes | None
    prompt: str
    tokens: list[int]
    offsets: list[tuple[int, int]]
    background: str = BACKGROUND
    """Colour behind the image's transparent pixels."""


def captions_of(model: LoadedModel, samples: Iterable[Sample], by: str, census: CensusSettings) -> list[LabelledText]:
    """Return the captions of samples that have the label, after the same prompts as in the census.

    Captions without any token are left out.
    """
    found = (_labelled_text(model, sample, by, _prompt(model, sample, census), sample.caption) for sample in samples)
    return [text for text in found if text is not None]


@dataclass(frozen=True)
class Question:
    """A question about a sample, with what people answered."""

    sample: Sample
    label: str
    text: str
    prompt: str
    answer: str
    """The most frequent of `answers`."""
    answers: tuple[str, ...]


def questions_of(
    model: LoadedModel, samples: Iterable[Sample], by: str, census: CensusSettings, count: int
) -> list[Question]:
    """Return the question that a sample's caption answers, or the first `count` of the others that the data has."""
    found = []
    for sample in samples:
        if (label := label_of(sample, by)) is None:
            continue
        if sample.question is not None:
            prompt = _prompt(model, sample, census)
            found.append(Question(sample, label, sample.question, prompt, sample.caption, sample.answers))
            continue
        for question, answer in (sample.questions or ())[:count]:
            prompt = prompt_text(model, question, None, image=sample.image is not None)
            found.append(Question(sample, label, question, prompt, answer, (answer,)))
    return found


def answers_of(model: LoadedModel, questions: Iterable[Question], by: str) -> list[LabelledText]:
    """Return the answers to questions as texts after their prompts."""
    found = (_labelled_text(model, one.sample, by, one.prompt, one.answer) for one in questions)
    return [text for text in found if text is not None]


def label_of(sample: Sample, by: str) -> str | None:
    """Return a sample's label."""
    return {"language": sample.language, "domain": sample.domain, **sample.labels}.get(by)


def _prompt(model: LoadedModel, sample: Sample, census: CensusSettings) -> str:
    prefix, asked = prefix_given(census, sample.caption), sample.asked(census.prompt)
    return prompt_text(model, asked, sample.language, image=sample.image is not None, prefix=prefix)


def _labelled_text(model: LoadedModel, sample: Sample, by: str, prompt: str, text: str) -> LabelledText | None:
    label = label_of(sample, by)
    if label is None or not text.strip():
        return None
    tokens, offsets = tokenize_caption(model, prompt, text)
    if not tokens:
        return None
    return LabelledText(sample.sample_id, label, sample.image, prompt, tokens, offsets, sample.background)


def in_batches(
    model: LoadedModel,
    texts: Iterable[LabelledText],
    size: int,
    work: Callable[[Sequence[LabelledText], Batch], Result],
    most: int = POSITIONS,
) -> list[Result]:
    """Return the results of `work` on batches of similar length; a batch has images for all of its texts or none.

    It has at most `size` texts and `most` tokens of them, but at least one text.

    A batch that fails, because of memory or images of different sizes, is halved. Raises ShardError for a text that
    fails alone: the census could run it, so leaving it out silently would change what is measured.
    """

    def encode_and_work(batch: Sequence[LabelledText]) -> Result:
        images = [None if text.image is None else decode_image(text.image, text.background) for text in batch]
        prompts, tokens = [text.prompt for text in batch], [text.tokens for text in batch]
        return work(batch, encode(model, prompts, images, tokens, [text.offsets for text in batch]))

    # Similar lengths need little padding; the id makes the order the same in every call.
    ordered = sorted(texts, key=lambda text: (text.image is None, text.prompt, len(text.tokens), text.sample_id))
    batches = (
        batch
        for _, group in groupby(ordered, key=lambda text: text.image is None)
        for some in within_budget(group, lambda text: pixels_of(model, text.image), BUDGET, size)
        for batch in within_budget(some, lambda text: len(text.tokens), most)
    )
    return [result for batch in batches for result in split_on_failure(batch, encode_and_work, _refuse)]


def image_batches(
    model: LoadedModel, items: Sequence[Item], sample: Callable[[Item], Sample], size: int
) -> Iterator[list[Item]]:
    """Yield batches of items whose samples all have an image, or none; at most `size`, and within the pixel budget."""
    for with_image in (True, False):
        group = [item for item in items if (sample(item).image is not None) == with_image]
        yield from within_budget(group, lambda item: pixels_of(model, sample(item).image), BUDGET, size)


def _refuse(text: LabelledText, problem: str) -> None:
    raise ShardError(f"sample {text.sample_id}: {problem}")


def token_positions(batch: Batch, texts: Sequence[LabelledText]) -> list[TokenPosition]:
    """Return the positions that predict the tokens of each row's text, row by row."""
    return [
        # The position before a token predicts it.
        TokenPosition(row, batch.caption_start[row] + number - 1, token, text.label, text.sample_id)
        for row, text in enumerate(texts)
        for number, token in enumerate(batch.tokens[row])
    ]


@torch.inference_mode()
def read(model: LoadedModel, batch: Batch, positions: Sequence[TokenPosition]) -> Float[Tensor, "position 2"]:
    """Run a batch, and return per position its token's negative log-likelihood, and 1 if it is the top token."""
    states: list[Tensor] = []
    # Captured before the norm, so that only these positions are projected onto the vocabulary.
    with capture_input(model.norm, states.append):
        forward(model, batch)
    rows = torch.tensor([position.row * batch.positions + position.position for position in positions])
    tokens = torch.tensor([position.token for position in positions])
    hidden = states[-1].flatten(0, -2)
    found = []
    # A few at a time: logits of all tokens of a long text would fill the memory.
    for some, own in zip(*(torch.split(part, LOGITS_AT_ONCE) for part in (rows, tokens)), strict=True):
        logits = vocabulary_logits(model, hidden[some.to(hidden.device)]).cpu()
        nll = -logits.log_softmax(dim=1).gather(1, own[:, None])[:, 0]
        found.append(torch.stack([nll, (logits.argmax(dim=1) == own).float()], dim=1))
    return torch.cat(found)


def by_text(positions: Sequence[TokenPosition]) -> list[slice]:
    """Return each row's slice of the positions."""
    found, start = [], 0
    for _, group in groupby(positions, key=lambda position: position.row):
        stop = start + len(list(group))
        found.append(slice(start, stop))
        start = stop
    return found
