r"""Build a batch from images, prompts and captions, with the position of every caption token.

A row is the prompt, as the family's own processor makes it, followed by the caption's tokens:

    USER: <image><image>…\nDescribe the image in few words. ASSISTANT: An image of a dog .
    └───────────────────── prompt ──────────────────────────────────┘└─── caption ────┘

A text-only model gets plain text by default: after nothing but a start token, so that the first token is predicted too.

Rows are padded on the right. Under a causal mask, padding then can't change what comes before it, so scores don't
depend on which samples share a batch. Left padding would shift position ids: on the demo that changed activations by
up to 2e-4. Generation must pad on the left.
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
from mmray.models.families import habits_of
from mmray.models.loading import LoadedModel
from mmray.models.processing import EXAMPLE_QUESTION, IMAGE_MASK, processed, question_text
from mmray.models.templates import render

PROMPTS = {
    "en": EXAMPLE_QUESTION,
    "es": "Describe la imagen en pocas palabras.",
    "fr": "Décris l’image en quelques mots.",
    "zh": "用 几句 话 描述 这张 图片 。",
}
"""The prompt of Pan et al. 2024, by the language of the caption; other languages get the English one."""

CAPTION_VALUES = {
    "input_ids": None,
    "attention_mask": 1,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
    "cross_attention_mask": None,
    "image_attention_mask": None,
    IMAGE_MASK: 0,
}
"""Inputs with one column per position → their value at caption tokens. None: the token id itself; for masks of
cross-attention, their value at the prompt's last token."""


POSITIONS = 4096
"""Tokens of captions or texts that a batch may have; a longer text is alone. All their activations are held at once."""


@dataclass(frozen=True)
class TokenSpan:
    """Positions `[start, stop)` of one sample's sequence with one modality: `image`, or `text` for the caption."""

    row: int
    """The sample's number in the batch."""
    start: int
    stop: int
    modality: str


@dataclass(frozen=True)
class Path:
    """Where one sample's sequence is, if samples share rows."""

    row: int
    positions: list[int]
    """Position in the row of each token of the sequence, prompt first."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, and where each sample's caption and image are in it.

    Positions are those in the sample's own unpadded sequence, also where samples share a row; `flat` gives the place in
    the row.
    """

    inputs: dict[str, Tensor]
    positions: int
    """Length of the rows."""
    caption_start: list[int]
    """Per sample, the position of the first caption token."""
    tokens: list[list[int]]
    """Per sample, the caption's token ids."""
    offsets: list[list[tuple[int, int]]]
    """Per sample, the characters `(start, stop)` of the caption that each token covers."""
    spans: list[TokenSpan]
    paths: list[Path] | None = None
    """Per sample, if samples share rows; None: each has the row of its own number."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return row_count(len(self.tokens), self.paths)

    def flat(self, row: int, position: int) -> int:
        """Return the index into (row, position), flattened, of a position of a sample's sequence."""
        if self.paths is None:
            return row * self.positions + position
        path = self.paths[row]
        return path.row * self.positions + path.positions[position]

    def image_positions(self, row: int) -> list[int]:
        """Return the positions of a sample's image tokens."""
        spans = (span for span in self.spans if span.row == row and span.modality == "image")
        return [position for span in spans for position in range(span.start, span.stop)]

    def to(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the inputs on the device, pixels in the network's dtype."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype, non_blocking=True)
            for name, value in self.inputs.items()
        }


def row_count(samples: int, paths: Sequence[Path] | None) -> int:
    """Return the rows of a batch of so many samples."""
    return samples if paths is None else 1 + paths[-1].row


def prompt_text(
    model: LoadedModel, prompt: str | None, language: str | None, *, image: bool = True, prefix: str | None = None
) -> str:
    """Return the text before a caption: the question in the family's chat template, up to where the answer begins.

    `prefix` forces the beginning of the answer ("An image of" in Pan et al. 2024). Raises InputError for a prefix if
    prompt and answer are not one causal sequence.
    """
    if model.parts.reads_images:
        question = prompt if prompt is not None else PROMPTS.get((language or "en")[:2].lower(), PROMPTS["en"])
        question = question_text(model.name, model.processor, model.network.config, question, image=image)
    else:
        question = _text_question(model, prompt)
    if not prefix:
        return question
    if model.parts.encoder_decoder or habits_of(model.network.config).sees_later == "prompt":
        raise InputError(f"{model.name}: --prefix needs a decoder that reads prompt and answer as one causal sequence")
    return f"{question}{'' if not question or question[-1].isspace() else ' '}{prefix.strip()}"


def prefix_before(caption: str, prefix: str | None) -> str | None:
    """Return the prefix to put before a caption; None if the caption begins with it already."""
    return None if prefix and caption.casefold().startswith(prefix.strip().casefold()) else prefix


def _text_question(model: LoadedModel, prompt: str | None) -> str:
    """Return a question to a text-only model; without one, nothing: the text is read as it is."""
    if not prompt or not model.tokenizer.chat_template:
        return (prompt or "").rstrip(" ")
    # Templates of text models take a text, those of others a list of texts and images.
    return render(model.name, model.tokenizer, [{"role": "user", "content": prompt}])


def tokenize_caption(model: LoadedModel, prompt: str, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the caption's token ids as they follow the prompt, and the caption's characters that each covers.

    If the space between the two is a token of its own, it comes first and covers nothing.
    """
    return tokenize_captions(model, [prompt], [caption])[0]


def tokenize_captions(
    model: LoadedModel, prompts: Sequence[str], captions: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return what `tokenize_caption` does for each; a call of a tokenizer takes longer than a caption."""
    if not prompts:
        return []
    # Tokenised together with the prompt: many tokenizers encode the first word differently at the start of a text.
    full_prompts = [prompt + habits_of(model.network.config).prompt_end for prompt in prompts]
    befores = [
        full if not full or full[-1].isspace() or caption[:1].isspace() else full + " "
        for full, caption in zip(full_prompts, captions, strict=True)
    ]
    # Not verbose: a text may be longer than the tokenizer expects, because it is cut into windows.
    encoded: Any = model.tokenizer(
        [before + caption for before, caption in zip(befores, captions, strict=True)],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    found = []
    columns = zip(full_prompts, befores, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for full_prompt, before, tokens, places in columns:
        own = [pair for pair in zip(tokens, places, strict=True) if pair[1][1] > len(full_prompt)]
        offsets = [(max(0, start - len(before)), max(0, stop - len(before))) for _, (start, stop) in own]
        found.append(([token for token, _ in own], offsets))
    return found


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
        return _encode_decoder(model, features, tokens, offsets)
    image_before = 0 if images[0] is None else model.parts.image_before
    lengths = features["attention_mask"].sum(dim=1).tolist()
    total = max(length + len(caption) for length, caption in zip(lengths, tokens, strict=True))
    prompt_shape = features["input_ids"].shape
    inputs = {}
    for name, value in features.items():
        aligned = value.shape[:2] == prompt_shape and name in CAPTION_VALUES
        inputs[name] = _extend(model, name, value, lengths, tokens, total) if aligned else value
    before = [row[:length] for row, length in zip(features["input_ids"].tolist(), lengths, strict=True)]
    spans = spans_of(model, before, tokens, features.get(IMAGE_MASK), image_before)
    starts = [image_before + length for length in lengths]
    return Batch(inputs, image_before + total, starts, list(tokens), list(offsets), spans)


def run_processor(model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None]) -> dict[str, Tensor]:
    """Return the family's processor's output for prompts and images, padded on the right.

    Without an end token that the tokenizer adds (BERT's), because the caption goes on, unless an encoder reads the
    prompt. Either all rows have an image or none has. Raises InputError if the processor raises.
    """
    if not model.parts.reads_images:
        return _run_tokenizer(model, prompts, images)
    features = processed(model.name, model.processor, prompts, images)
    if model.parts.encoder_decoder:
        return features
    features = _without_end(model, features, prompts)
    if habits_of(model.network.config).rewrites_prompt:
        features["input_ids"][:, 0] = model.network.config.get_text_config().bos_token_id
    return features


def _without_end(model: LoadedModel, features: dict[str, Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the features without the end token after each prompt, unless the prompt itself has it."""
    ends = {
        token: str(model.tokenizer.convert_ids_to_tokens(token))
        for token in (model.tokenizer.sep_token_id, model.tokenizer.eos_token_id)
        if token is not None
    }
    ids, mask = features["input_ids"].clone(), features["attention_mask"].clone()
    for row, (length, prompt) in enumerate(zip(mask.sum(dim=1).tolist(), prompts, strict=True)):
        end = ends.get(int(ids[row, length - 1]))
        if end is not None and not prompt.endswith(end):
            ids[row, length - 1], mask[row, length - 1] = _padding(model), 0
    shape, longest = ids.shape, int(mask.sum(dim=1).max())
    return {
        name: value[:, :longest] if name in CAPTION_VALUES and value.shape[:2] == shape else value
        for name, value in (features | {"input_ids": ids, "attention_mask": mask}).items()
    }


def _run_tokenizer(model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None]) -> dict[str, Tensor]:
    """Return a text-only model's inputs, padded on the right; raises InputError if there are images."""
    if any(image is not None for image in images):
        raise InputError(f"{model.name}: reads text only; use data without images (--image-column none)")
    bos = model.tokenizer.bos_token
    rows = [
        # The template may have written the token that the tokenizer would add.
        model.tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"]
        or [_first_token(model)]
        for prompt in prompts
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [_padding(model)] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _first_token(model: LoadedModel) -> int:
    """Return what a text begins after: the token that begins or, where there is none, that separates texts."""
    token = model.tokenizer.bos_token_id
    return _padding(model) if token is None else int(token)


def pad_left(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the padding from the right of the prompts to their left, because generation appends on the right."""
    # The processors' own padding_side="left" won't do: the BLIPs' put padding between image and question, and shift
    # the Q-Former's positions.
    shape, mask = features["input_ids"].shape, features["attention_mask"]
    padding = (shape[1] - mask.sum(dim=1)).tolist()
    moved = dict(features)
    for name, value in features.items():
        if name in CAPTION_VALUES and value.shape[:2] == shape:
            moved[name] = torch.stack([row.roll(count, 0) for row, count in zip(value, padding, strict=True)])
    return moved


def _padding(model: LoadedModel) -> int:
    token = model.tokenizer.pad_token_id
    return int(token) if token is not None else int(model.tokenizer.eos_token_id or 0)


def _extend(
    model: LoadedModel, name: str, value: Tensor, lengths: list[int], tokens: Sequence[list[int]], total: int
) -> Tensor:
    """Lengthen one input with a column per position, so that it covers the captions too."""
    rows, _, *rest = value.shape
    types = habits_of(model.network.config).caption_type
    fill = types if name == "token_type_ids" else CAPTION_VALUES[name]
    longer = value.new_full((rows, total, *rest), _padding(model) if name == "input_ids" else 0)
    for row, (length, caption) in enumerate(zip(lengths, tokens, strict=True)):
        longer[row, :length] = value[row, :length]
        values = torch.tensor(caption) if name == "input_ids" else value[row, length - 1] if fill is None else fill
        longer[row, length : length + len(caption)] = values
    return longer


def _encode_decoder(
    model: LoadedModel,
    features: dict[str, Tensor],
    tokens: Sequence[list[int]],
    offsets: Sequence[list[tuple[int, int]]],
) -> Batch:
    """Build the batch of an encoder-decoder model: the decoder's sequence is the start token and the caption."""
    start = _start_token(model)
    total = 1 + max(map(len, tokens))
    decoder = torch.full((len(tokens), total), _padding(model))
    mask = torch.zeros_like(decoder)
    for row, caption in enumerate(tokens):
        decoder[row, : len(caption) + 1] = torch.tensor([start, *caption])
        mask[row, : len(caption) + 1] = 1
    inputs = features | {"decoder_input_ids": decoder, "decoder_attention_mask": mask}
    spans = [TokenSpan(row, 1, 1 + len(caption), "text") for row, caption in enumerate(tokens)]
    return Batch(inputs, total, [1] * len(tokens), list(tokens), list(offsets), spans)


def _start_token(model: LoadedModel) -> int:
    """Return the token that an encoder-decoder's answers begin with; T5Gemma has none but that of every text."""
    settings: Any = model.network.generation_config
    configured = getattr(model.network.config.get_text_config(), "decoder_start_token_id", None)
    found = next(one for one in (configured, settings.decoder_start_token_id, settings.bos_token_id) if one is not None)
    return int(found)


def spans_of(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    tokens: Sequence[list[int]],
    marked: Int[Tensor, "row position"] | None = None,
    image_before: int = 0,
) -> list[TokenSpan]:
    """Return the spans of samples' images and captions, given the tokens of prompts and captions.

    The image is where its placeholder is in the prompt or, without one, where `marked` is 1, or the positions before
    the prompt.
    """
    spans, parts = [], model.parts
    for row, (prompt, caption) in enumerate(zip(prompts, tokens, strict=True)):
        if image_before:
            spans.append(TokenSpan(row, 0, image_before, "image"))
        length = image_before + len(prompt)
        given, image = (prompt, parts.image_token_id) if marked is None else (marked[row].tolist(), 1)
        for value, group in groupby(range(len(prompt)), key=given.__getitem__):
            if value == image and parts.image_in_sequence:
                positions = list(group)
                spans.append(TokenSpan(row, positions[0], positions[-1] + 1, "image"))
        spans.append(TokenSpan(row, length, length + len(caption), "text"))
    return spans
