r"""Many prompts about one image in one row, so that the image is read once for all of them.

    prefix ───────────────┐┌ prompt 1, reply 1 ┐┌ prompt 2, reply 2 ──────────────┐
    USER: <image>×64 \n    Describe … A dog .   Is there a cat in the image? … No

Behind a mask that hides the other prompts, and with the positions that each would have alone, a prompt's states are what
they are in a row of its own, up to rounding. Not every architecture takes such a mask: `packs` proves it on an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, encode, run_processor

REBUILT = ("input_ids", "attention_mask")
TYPES = "mm_token_type_ids"
"""Which positions are of the image: 0 for all that is written."""


@dataclass(frozen=True)
class Placed:
    """A batch, and for each prompt the row it is in and the positions of its own sequence, the reply's last."""

    batch: Batch
    rows: list[int]
    positions: list[list[int]]


def alone(
    model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None], replies: Sequence[list[int]]
) -> Placed:
    """Return the batch in which each prompt, with its reply behind it, has a row of its own."""
    batch = encode(model, prompts, images, replies, [[] for _ in replies])
    positions = [list(range(start + len(reply))) for start, reply in zip(batch.caption_start, replies, strict=True)]
    return Placed(batch, list(range(len(replies))), positions)


def packed(
    model: LoadedModel,
    images: Sequence[Image],
    prompts: Sequence[Sequence[str]],
    replies: Sequence[Sequence[list[int]]],
) -> Placed | None:
    """Return the batch with a row for each image, its prompts with their replies one behind the other.

    None where the family has inputs that this can't rebuild, or sees the image otherwise than as tokens of the prompt.
    """
    placeholder = _placeholder(model)
    if placeholder is None:
        return None
    features = run_processor(model, [group[0] for group in prompts], images)
    shape = features["input_ids"].shape
    aligned = {name for name, value in features.items() if value.shape[:2] == shape}
    if not aligned <= {*REBUILT, TYPES}:
        return None
    lengths = features["attention_mask"].sum(dim=1).tolist()
    rows = []
    for number, (group, said) in enumerate(zip(prompts, replies, strict=True)):
        first = features["input_ids"][number, : lengths[number]].tolist()
        sequences = _expanded(model, group, first, placeholder)
        if sequences is None:
            return None
        rows.append(_row(sequences, said))
    return _placed(model, features, rows, replies)


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    places: list[int]
    """The position that each token would have alone."""
    segments: list[int]
    """0 for the prefix that all prompts share, else the prompt's number from 1."""
    positions: list[list[int]]


def _placeholder(model: LoadedModel) -> int | None:
    """Return the token that stands for the image before the processor puts the image's tokens there."""
    token = getattr(model.processor, "image_token", None)
    if model.parts.image != "tokens" or model.parts.encoder_decoder or not isinstance(token, str):
        return None
    return int(model.tokenizer.convert_tokens_to_ids(token))


def _expanded(
    model: LoadedModel, prompts: Sequence[str], first: list[int], placeholder: int
) -> list[list[int]] | None:
    """Return every prompt's tokens, those of the image as the processor wrote them in the `first` one."""
    bos = model.tokenizer.bos_token
    written = not (bos and prompts[0].startswith(bos))
    encoded: Any = model.tokenizer(list(prompts), add_special_tokens=written)
    plain: list[list[int]] = encoded["input_ids"]
    if any(tokens.count(placeholder) != 1 for tokens in plain):
        return None
    start = plain[0].index(placeholder)
    behind = plain[0][start + 1 :]
    stop = len(first) - len(behind)
    if first[:start] != plain[0][:start] or first[stop:] != behind or not behind:
        return None
    image = first[start:stop]
    places = [tokens.index(placeholder) for tokens in plain]
    return [[*tokens[:at], *image, *tokens[at + 1 :]] for tokens, at in zip(plain, places, strict=True)]


def _row(sequences: list[list[int]], replies: Sequence[list[int]]) -> _Row:
    # The last token of each prompt stays its own: what it predicts is the reply.
    shared = min(len(commonprefix(sequences)), *(len(tokens) - 1 for tokens in sequences))
    tokens, places, segments = sequences[0][:shared], list(range(shared)), [0] * shared
    positions = []
    for number, (sequence, reply) in enumerate(zip(sequences, replies, strict=True), 1):
        own = [*sequence[shared:], *reply]
        positions.append([*range(shared), *range(len(tokens), len(tokens) + len(own))])
        tokens = tokens + own
        places.extend(range(shared, shared + len(own)))
        segments.extend([number] * len(own))
    return _Row(tokens, places, segments, positions)


def _placed(
    model: LoadedModel, features: dict[str, Tensor], rows: list[_Row], replies: Sequence[Sequence[list[int]]]
) -> Placed:
    total = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), total, dtype=torch.long)
    places = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        places[number, : len(row.tokens)] = torch.tensor(row.places)
        segments[number, : len(row.tokens)] = torch.tensor(row.segments)
    same = segments[:, :, None] == segments[:, None, :]
    seen = (same | (segments[:, None, :] == 0)).tril()
    # Added to the attention's logits, a form that every implementation takes but those that take no mask at all.
    hidden = torch.finfo(model.network.dtype).min * (~seen[:, None]).to(torch.float32)
    inputs = {name: value for name, value in features.items() if name not in (*REBUILT, TYPES)}
    inputs |= {"input_ids": ids, "attention_mask": hidden, "position_ids": places}
    if TYPES in features:
        kinds = torch.zeros_like(ids)
        width = min(total, features[TYPES].shape[1])
        prefix = (segments[:, :width] == 0).long()
        kinds[:, :width] = features[TYPES][:, :width] * prefix
        inputs[TYPES] = kinds
    said = [reply for group in replies for reply in group]
    batch = Batch(inputs, total, [], said, [], [])
    numbers = [number for number, row in enumerate(rows) for _ in row.positions]
    return Placed(batch, numbers, [places for row in rows for places in row.positions])
