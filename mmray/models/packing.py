r"""Many prompts about one image in one row, so that the image is read once for all of them.

The row is a tree of tokens: what sequences have in common at their start stands in it once.

    USER: <image>×64 \n ┬ Describe the image … ASSISTANT: A dog .
                        └ Is there a ┬ cat in the image? ASSISTANT: ┬ No
                                     └ dog in the image? …          └ Yes

Behind a mask that shows each token what leads to it, and with the positions that it would have alone, its states are
what they are in a row of its own, up to rounding. Not every architecture takes such a mask: who uses it proves it on an
example first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
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


def unshared(
    model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None], replies: Sequence[list[int]]
) -> Placed:
    """Return the batch in which each prompt, with its reply behind it, has a row of its own."""
    batch = encode(model, prompts, images, replies, [[] for _ in replies])
    positions = [list(range(start + len(reply))) for start, reply in zip(batch.caption_start, replies, strict=True)]
    return Placed(batch, list(range(len(replies))), positions)


def shared_prefix(
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
        rows.append(_tree([[*sequence, *reply] for sequence, reply in zip(sequences, said, strict=True)]))
    return _placed(model, features, rows, [reply for group in replies for reply in group])


@dataclass(frozen=True)
class _Tree:
    """Tokens, each with its depth and the token before it (-1: none), and the path of each sequence through them."""

    tokens: list[int]
    depths: list[int]
    parents: list[int]
    paths: list[list[int]]


def _placeholder(model: LoadedModel) -> int | None:
    """Return the token that stands for the image before the processor puts the image's tokens there."""
    token = getattr(model.processor, "image_token", None)
    if not model.parts.image_in_sequence or not isinstance(token, str):
        return None
    return int(model.tokenizer.convert_tokens_to_ids(token))


def _expanded(model: LoadedModel, prompts: Sequence[str], first: list[int], placeholder: int) -> list[list[int]] | None:
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


def _tree(sequences: list[list[int]]) -> _Tree:
    """Return the tree of these sequences; the first one's tokens come first, in order."""
    known: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    paths = []
    for sequence in sequences:
        at, path = -1, []
        for depth, token in enumerate(sequence):
            if (at, token) not in known:
                known[at, token] = len(tokens)
                tokens.append(token)
                depths.append(depth)
                parents.append(at)
            at = known[at, token]
            path.append(at)
        paths.append(path)
    return _Tree(tokens, depths, parents, paths)


def _seen(tree: _Tree, total: int) -> Bool[ndarray, "total total"]:
    """Return which tokens each one sees: itself and what leads to it. Padding sees itself alone."""
    seen = np.eye(total, dtype=bool)
    for place, parent in enumerate(tree.parents):
        if parent >= 0:
            seen[place] |= seen[parent]
    return seen


def _placed(model: LoadedModel, features: dict[str, Tensor], trees: list[_Tree], replies: list[list[int]]) -> Placed:
    total = max(len(tree.tokens) for tree in trees)
    ids, depths = torch.zeros(2, len(trees), total, dtype=torch.long)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        depths[row, : len(tree.tokens)] = torch.tensor(tree.depths)
    seen = torch.from_numpy(np.stack([_seen(tree, total) for tree in trees]))
    # Added to the attention's logits, a form that every implementation takes but those that take no mask at all.
    hidden = torch.finfo(model.network.dtype).min * (~seen[:, None]).to(torch.float32)
    inputs = {name: value for name, value in features.items() if name not in (*REBUILT, TYPES)}
    inputs |= {"input_ids": ids, "attention_mask": hidden, "position_ids": depths}
    if TYPES in features:
        inputs[TYPES] = torch.zeros_like(ids)
        inputs[TYPES][:, : features[TYPES].shape[1]] = features[TYPES] * features["attention_mask"]
    batch = Batch(inputs, total, [], replies, [], [])
    rows = [row for row, tree in enumerate(trees) for _ in tree.paths]
    return Placed(batch, rows, [path for tree in trees for path in tree.paths])
