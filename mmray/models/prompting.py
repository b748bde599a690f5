r"""From images, prompts and captions to a batch that the network takes, with the place of every caption token.

A row of a batch is the prompt, as the family's own processor makes it, and behind it the caption's tokens:

    USER: <image><image>…\nDescribe the image in few words. ASSISTANT: An image of a dog .
    └───────────────────── prompt ──────────────────────────────────┘└─── caption ────┘

Rows are padded on the right: behind a causal mask, padding then can't change a single bit of what stands before it, so
that scores don't depend on which samples share a batch. (Left padding shifts the positions; on the demo that changed
activations by up to 2e-4.) Generation pads on the left, as it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from mmray.errors import InputError
from mmray.models.loading import LoadedModel
from mmray.models.templates import render

PROMPTS = {
    "en": "Describe the image in few words.",
    "es": "Describe la imagen en pocas palabras.",
    "fr": "Décris l’image en quelques mots.",
    "zh": "用 几句 话 描述 这张 图片 。",
}
"""The prompt of Pan et al. 2024, by the language of the caption; other languages get the English one."""

ENDS = {"paligemma": "\n"}
"""What a family's processor writes behind the prompt by itself."""

BEHIND = {
    "input_ids": None,
    "attention_mask": 1,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "cross_attention_mask": None,
}
"""Inputs with a column a position → what stands there for a caption token. None: the token itself; for the mask of
cross-attention, what stands at the prompt's last token."""

CAUSAL_TYPE = {"paligemma": 1}
"""Families whose `token_type_ids` tell the prompt, seen in both directions, from what is written: there 0 leaks."""


@dataclass(frozen=True)
class TokenSpan:
    """Neighbouring positions `[start, stop)` of one row that hold one modality: `image` or caption `text`."""

    row: int
    start: int
    stop: int
    modality: str


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, and where each row's caption stands in it.

    `caption_start[row]` is the position of the first caption token, `tokens[row]` the caption's token ids, and
    `offsets[row]` the characters `(start, stop)` of the caption that each token covers.
    """

    inputs: dict[str, Tensor]
    positions: int
    caption_start: list[int]
    tokens: list[list[int]]
    offsets: list[list[tuple[int, int]]]
    runs: list[TokenSpan]

    def to(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the inputs on the device, pixels in the network's number format."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype, non_blocking=True)
            for name, value in self.inputs.items()
        }


def prompt_text(
    model: LoadedModel, prompt: str | None, language: str | None, *, image: bool = True, prefix: str | None = None
) -> str:
    """Return the text before a caption: the question in the family's chat template, the answer about to begin.

    `prefix` is the beginning of the answer that the model is made to give ("An image of", as published). Raises
    InputError for one to a model whose answer is not of one sequence, read in one direction, with the prompt.
    """
    asked = _question(model, prompt, language, image=image)
    if not prefix:
        return asked
    if model.parts.encoder_decoder or model.parts.family in CAUSAL_TYPE:
        raise InputError(f"{model.name}: --prefix needs a decoder that reads prompt and answer as one causal sequence")
    return f"{asked}{'' if not asked or asked[-1].isspace() else ' '}{prefix.strip()}"


def prefix_before(caption: str, prefix: str | None) -> str | None:
    """Return the prefix to put before a caption: none where the caption begins with it."""
    return None if prefix and caption.casefold().startswith(prefix.strip().casefold()) else prefix


def _question(model: LoadedModel, prompt: str | None, language: str | None, *, image: bool) -> str:
    question = prompt if prompt is not None else PROMPTS.get((language or "en")[:2].lower(), PROMPTS["en"])
    content: list[dict[str, str]] = [{"type": "text", "text": question}]
    if image:
        content.insert(0, {"type": "image"})
    if getattr(model.processor, "chat_template", None):
        return render(model.name, model.processor, [{"role": "user", "content": content}])
    # A blank at the end belongs to the answer's first token, and would be one of its own.
    question = question.rstrip(" ")
    # Without a template the image's place has to be written; the BLIPs' processors write it unasked.
    if image and not hasattr(model.network.config, "qformer_config"):
        named = (getattr(model.processor, name, None) for name in ("boi_token", "image_token"))
        return f"{next(filter(None, named), '')}{question}"
    return question


def tokenize_caption(model: LoadedModel, prompt: str, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the caption's token ids as they follow the prompt, and the characters of the caption each covers.

    Prompt and caption are tokenised together, for many tokenizers write the first word differently on its own. The
    blank between the two, where it is a token of its own, comes first and covers nothing.
    """
    written = prompt + ENDS.get(model.parts.family, "")
    before = written if not written or written[-1].isspace() else written + " "
    encoded: Any = model.tokenizer(before + caption, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = [], []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if stop > len(written):
            ids.append(token)
            offsets.append((max(0, start - len(before)), max(0, stop - len(before))))
    return ids, offsets


def encode(
    model: LoadedModel,
    prompts: Sequence[str],
    images: Sequence[Image | None],
    tokens: Sequence[list[int]],
    offsets: Sequence[list[tuple[int, int]]],
) -> Batch:
    """Build the batch of these prompts, images and caption tokens (from `tokenize_caption`, or generated)."""
    features = run_processor(model, prompts, images)
    if model.parts.encoder_decoder:
        return _behind_encoder(model, features, tokens, offsets)
    lengths = features["attention_mask"].sum(dim=1).tolist()
    total = max(length + len(caption) for length, caption in zip(lengths, tokens, strict=True))
    prompt_shape = features["input_ids"].shape
    inputs = {}
    for name, value in features.items():
        aligned = value.shape[:2] == prompt_shape and name in BEHIND
        inputs[name] = _extend(model, name, value, lengths, tokens, total) if aligned else value
    return Batch(
        inputs, total, lengths, list(tokens), list(offsets), _runs(model, inputs["input_ids"], lengths, tokens)
    )


def run_processor(model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None]) -> dict[str, Tensor]:
    """Return what the family's processor makes of prompts and images, padded on the right.

    All rows have an image or none has. Raises InputError where the processor refuses.
    """
    bos = model.tokenizer.bos_token
    extra: dict[str, Any] = {}
    if bos and prompts[0].startswith(bos):
        extra["add_special_tokens"] = False  # the template has written it: the tokenizer would write a second one
    pictures = [[image] for image in images if image is not None]
    if pictures:
        extra["images"] = pictures
    try:
        features = model.processor(text=list(prompts), return_tensors="pt", padding=True, padding_side="right", **extra)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{model.name}: its processor refuses the batch ({error})") from error
    return {name: value for name, value in features.items() if isinstance(value, Tensor) and name != "labels"}


def pad_left(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the padding from behind the prompts to before them, for what is generated is written behind them.

    Processors that are asked for it do otherwise: those of the BLIPs put it between image and question, and shift the
    Q-Former's positions.
    """
    shape, mask = features["input_ids"].shape, features["attention_mask"]
    spare = (shape[1] - mask.sum(dim=1)).tolist()
    moved = dict(features)
    for name, value in features.items():
        if name in BEHIND and value.shape[:2] == shape:
            moved[name] = torch.stack([row.roll(count, 0) for row, count in zip(value, spare, strict=True)])
    return moved


def _padding(model: LoadedModel) -> int:
    token = model.tokenizer.pad_token_id
    return int(token) if token is not None else int(model.tokenizer.eos_token_id or 0)


def _extend(
    model: LoadedModel, name: str, value: Tensor, lengths: list[int], tokens: Sequence[list[int]], total: int
) -> Tensor:
    """Lengthen one input that has a column a position, so that it covers the captions too."""
    rows, _, *rest = value.shape
    behind = CAUSAL_TYPE.get(model.parts.family, 0) if name == "token_type_ids" else BEHIND[name]
    longer = value.new_full((rows, total, *rest), _padding(model) if name == "input_ids" else 0)
    for row, (length, caption) in enumerate(zip(lengths, tokens, strict=True)):
        longer[row, :length] = value[row, :length]
        written = torch.tensor(caption) if name == "input_ids" else value[row, length - 1] if behind is None else behind
        longer[row, length : length + len(caption)] = written
    return longer


def _behind_encoder(
    model: LoadedModel,
    features: dict[str, Tensor],
    tokens: Sequence[list[int]],
    offsets: Sequence[list[tuple[int, int]]],
) -> Batch:
    """Build the batch of an encoder-decoder model: the caption alone is the decoder's sequence, behind its start."""
    start = model.network.config.get_text_config().decoder_start_token_id
    total = 1 + max(map(len, tokens))
    decoder = torch.full((len(tokens), total), _padding(model))
    mask = torch.zeros_like(decoder)
    for row, caption in enumerate(tokens):
        decoder[row, : len(caption) + 1] = torch.tensor([start, *caption])
        mask[row, : len(caption) + 1] = 1
    inputs = features | {"decoder_input_ids": decoder, "decoder_attention_mask": mask}
    runs = [TokenSpan(row, 1, 1 + len(caption), "text") for row, caption in enumerate(tokens)]
    return Batch(inputs, total, [1] * len(tokens), list(tokens), list(offsets), runs)


def _runs(
    model: LoadedModel, ids: Int[Tensor, "row position"], lengths: list[int], tokens: Sequence[list[int]]
) -> list[TokenSpan]:
    runs, image_token = [], model.parts.image_token_id if model.parts.image_in_sequence else None
    for row, (length, caption) in enumerate(zip(lengths, tokens, strict=True)):
        is_image = ids[row, :length].eq(-1 if image_token is None else image_token).tolist()
        for image, group in groupby(range(length), key=is_image.__getitem__):
            if image:
                places = list(group)
                runs.append(TokenSpan(row, places[0], places[-1] + 1, "image"))
        runs.append(TokenSpan(row, length, length + len(caption), "text"))
    return runs
