"""Cut a text that is longer than a model reads into windows: every character, and so every token, is in one of them."""

from __future__ import annotations

from collections.abc import Sequence

from mmray.errors import InputError
from mmray.models.loading import LoadedModel
from mmray.models.prompting import tokenize_caption

WINDOW = 2048
"""Most tokens of a window by default: a longer context costs memory, and changes few predictions."""
LEAST = 32
"""Fewest tokens of a window: one character may have up to 18."""


def window_of(model: LoadedModel, prompt: str, window: int | None = None) -> int:
    """Return the most tokens of a text that the model reads after a prompt at once.

    That is `window`, by default WINDOW, or what the model's context leaves. Raises InputError if it leaves nothing.
    """
    most = window or WINDOW
    if model.context is None or model.parts.encoder_decoder:
        return most
    # Not by the processor, which may need an image. Without a prompt there is still the start token.
    before = max(1, len(model.tokenizer(prompt)["input_ids"]))
    if model.context < before + LEAST:
        raise InputError(
            f"{model.name}: the prompt has {before:,} tokens; the model reads {model.context:,}: shorten it"
        )
    return min(most, model.context - before)


def windows(model: LoadedModel, prompt: str, text: str, most: int) -> list[str]:
    """Return the text in pieces of at most `most` tokens after the prompt; joined, they are the text.

    A piece ends before a blank in its second half where there is one, so that words stay whole. A tokenizer that splits
    at blanks then gives the pieces the tokens of the whole text.
    """
    _, offsets = tokenize_caption(model, prompt, text)
    if len(offsets) <= most:
        return [text]
    pieces, first = [], 0
    start = 0
    while len(offsets) - first > most:
        first, stop = _cut(text, offsets, first, most)
        pieces.append(text[start:stop])
        start = stop
    pieces.append(text[start:])
    # By themselves, pieces of some tokenizers have a token more than in the whole text.
    return [part for piece in pieces for part in windows(model, prompt, piece, most)]


def _cut(text: str, offsets: Sequence[tuple[int, int]], first: int, most: int) -> tuple[int, int]:
    """Return the token that begins the piece after the one at token `first`, and the character where that ends."""
    # A character may have several tokens, and is not cut.
    allowed = [number for number in range(first + 1, first + most + 1) if offsets[number][0] >= offsets[number - 1][1]]
    ends = {number: offsets[number - 1][1] for number in allowed}
    at_blank = [
        number for number in allowed if text[ends[number] : ends[number] + 1].isspace() and 2 * (number - first) > most
    ]
    number = (at_blank or allowed)[-1]
    return number, ends[number]
