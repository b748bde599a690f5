"""Call a checkpoint's own processor: the question in its template, and the network's inputs for texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedConfig

from mmray.errors import InputError
from mmray.models.families import habits_of
from mmray.models.templates import render

EXAMPLE_QUESTION = "Describe the image in few words."

IMAGE_MASK = "image_embeds_position_mask"
"""Input that is 1 at the image's positions (Kosmos-2, whose image tokens all differ)."""


def question_text(name: str, processor: Any, config: PreTrainedConfig, question: str, *, image: bool) -> str:
    """Return the question in the family's chat template, or next to its placeholder, up to where the answer begins."""
    content: list[dict[str, str]] = [{"type": "text", "text": question}]
    if image:
        content.insert(0, {"type": "image"})
    if getattr(processor, "chat_template", None):
        return render(name, processor, [{"role": "user", "content": content}])
    # A trailing space belongs to the answer's first token; here it would become a token of its own.
    question = question.rstrip(" ")
    # Without a template the placeholder must be written here, unless the processor adds it.
    if image and not habits_of(config).adds_placeholder:
        placeholders = (getattr(processor, attribute, None) for attribute in ("boi_token", "image_token"))
        return f"{next(filter(None, placeholders), '')}{question}"
    return question


def processed(name: str, processor: Any, prompts: Sequence[str], images: Sequence[Image | None]) -> dict[str, Tensor]:
    """Return the family's processor's output for prompts and images, padded on the right.

    Either all rows have an image or none has. Raises InputError if the processor raises.
    """
    bos = processor.tokenizer.bos_token
    extra: dict[str, Any] = {}
    if bos and prompts[0].startswith(bos):
        extra["add_special_tokens"] = False  # The template wrote it: the tokenizer would add a second one.
    given = [image for image in images if image is not None]
    # A list per prompt, since some families count images per prompt; others take one flat list only.
    forms: list[dict[str, Any]] = [{"images": [[image] for image in given]}, {"images": given}] if given else [{}]
    refused: Exception | None = None
    for form in forms:
        try:
            features = processor(
                text=list(prompts), return_tensors="pt", padding=True, padding_side="right", **extra, **form
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            refused = refused or error
        else:
            return {key: value for key, value in features.items() if isinstance(value, Tensor) and key != "labels"}
    raise InputError(f"{name}: its processor refuses the batch ({refused})") from refused


def example_inputs(
    name: str,
    processor: Any,
    config: PreTrainedConfig,
    *,
    brightness: float = 1.0,
    size: tuple[int, int] = (96, 96),
    question: str = EXAMPLE_QUESTION,
) -> dict[str, Tensor]:
    """Return the network's inputs for one image, of a width and height in pixels, and a question."""
    prompt = question_text(name, processor, config, question, image=True)
    return processed(name, processor, [prompt], [noise_image(brightness).resize(size)])


def noise_image(brightness: float = 1.0) -> Image:
    """Return a small image of noise, always the same but for its brightness (a factor)."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    return PIL.Image.fromarray((noise * brightness).astype(np.uint8))
