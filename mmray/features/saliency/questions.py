"""From an image, a caption and a word of it to the place in a batch that is asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL.Image import Image

from mmray.detector.joint import JointModel
from mmray.errors import InputError
from mmray.features.saliency.saliency_input import JointInput, SaliencyInput, SequenceInput
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, encode, prefix_before, prompt_text, tokenize_caption
from mmray.neurons.concepts import Mention, find_forms
from mmray.neurons.token_positions import TokenPosition, place_mentions


def mentions_of(caption: str, word: str, language: str | None = None) -> list[Mention]:
    """Return where a caption says a word: a noun in any of its forms, and what is no noun as it is spelt.

    Raises InputError where it does not say it.
    """
    said = word.strip().casefold()
    found = find_forms(caption, frozenset({said}), language) if said else []
    if said and not found:
        spelt = re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", caption, re.IGNORECASE)
        found = [Mention(said, match.start(), match.end()) for match in spelt]
    if not found:
        raise InputError(f"the caption {caption!r} does not say {word!r}; give one that does, be it true or not")
    return found


def ask(
    model: LoadedModel,
    image: Image,
    caption: str,
    word: str,
    *,
    prompt: str | None = None,
    prefix: str | None = None,
    language: str | None = None,
) -> tuple[Batch, list[TokenPosition]]:
    """Return a batch of one row, and the place that predicts the first token of the word's first mention."""
    mention = mentions_of(caption, word, language)[0]
    before = prompt_text(model, prompt, language, prefix=prefix_before(caption, prefix))
    tokens, offsets = tokenize_caption(model, before, caption)
    batch = encode(model, [before], [image], [tokens], [offsets])
    return batch, place_mentions(batch, 0, "", [mention])


def look_at(
    model: LoadedModel, joint: JointModel | None, batch: Batch, places: Sequence[TokenPosition], images: Sequence[Image]
) -> SaliencyInput:
    """Return a look through the joint model where there is one, and else at the image tokens in the sequence."""
    sizes = [image.size for image in images]
    if joint is None:
        return SequenceInput(model, batch, places, sizes)
    return JointInput(joint, batch, places, joint.pixels(images), sizes)
