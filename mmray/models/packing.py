r"""Many prompts about one image in one row, so that the image is processed once.

The row is a tree of tokens: a prefix that sequences share appears once.

    USER: <image>×64 \n ┬ Describe the image … ASSISTANT: A dog .
                        └ Is there a ┬ cat in the image? ASSISTANT: ┬ No
                                     └ dog in the image? …          └ Yes

With an attention mask that shows each token only its own path, and with the position ids that it would have alone, its
states equal those of a row of its own, up to rounding. Not every architecture accepts such a mask: callers validate it
on an example first.
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
"""Marks image positions: 0 for text."""


@dataclass(frozen=True)
class PackedBatch:
    """A batch, and for each prompt its row and the positions of its sequence, prompt first and reply last."""

    batch: Batch
    rows: list[int]
    positions: list[list[int]]


def unshared(
    model: LoadedModel, prompts: Sequence[str], images: Sequence[Image | None], replies: Sequence[list[int]]
) -> PackedBatch:
    """Return the batch in which each prompt, followed by its reply, has a row of its own."""
    batch = encode(model, prompts, images, replies, [[] for _ in replies])
    positions = [list(range(start + len(reply))) for start, reply in zip(batch.caption_start, replies, strict=True)]
    return PackedBatch(batch, list(range(len(replies))), positions)


def shared_prefix(
    model: LoadedModel,
    images: Sequence[Image],
    prompts: Sequence[Sequence[str]],
    replies: Sequence[Sequence[list[int]]],
) -> PackedBatch | None:
    """Return the batch with one row per image, which holds all its prompts and replies.

    None if the family has inputs that this can't rebuild, or the image is not tokens of the prompt.
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
    for number, (group, answers) in enumerate(zip(prompts, replies, strict=True)):
        first = features["input_ids"][number, : lengths[number]].tolist()
        sequences = _expanded(model, group, first, placeholder)
        if sequences is None:
            return None
        rows.append(_tree([[*sequence, *reply] for sequence, reply in zip(sequences, answers, strict=True)]))
    return _pack(model, features, rows, [reply for group in replies for reply in group])


@dataclass(frozen=True)
class _Tree:
    """Tokens, each with its depth and parent (-1: none), and the path of each sequence through them."""

    tokens: list[int]
    depths: list[int]
    parents: list[int]
    paths: list[list[int]]


def _placeholder(model: LoadedModel) -> int | None:
    """Return the token that the processor replaces by the image's tokens; None if the family has none."""
    token = getattr(model.processor, "image_token", None)
    if not model.parts.image_in_sequence or not isinstance(token, str):
        return None
    return int(model.tokenizer.convert_tokens_to_ids(token))


def _expanded(model: LoadedModel, prompts: Sequence[str], first: list[int], placeholder: int) -> list[list[int]] | None:
    """Return every prompt's tokens with the image's tokens, which the processor wrote into the `first` prompt.

    None if the first prompt is anything but the plain tokens with the placeholder replaced.
    """
    bos = model.tokenizer.bos_token
    has_bos = bool(bos and prompts[0].startswith(bos))
    encoded: Any = model.tokenizer(list(prompts), add_special_tokens=not has_bos)
    plain: list[list[int]] = encoded["input_ids"]
    if any(tokens.count(placeholder) != 1 for tokens in plain):
        return None
    start = plain[0].index(placeholder)
    after = plain[0][start + 1 :]
    stop = len(first) - len(after)
    if first[:start] != plain[0][:start] or first[stop:] != after or not after:
        return None
    image = first[start:stop]
    indices = [tokens.index(placeholder) for tokens in plain]
    return [[*tokens[:at], *image, *tokens[at + 1 :]] for tokens, at in zip(plain, indices, strict=True)]


def _tree(sequences: list[list[int]]) -> _Tree:
    """Return the tree of these sequences; the first one's tokens come first, in order."""
    children: dict[tuple[int, int], int] = {}
    tree = _Tree([], [], [], [])
    for sequence in sequences:
        node, path = -1, []
        for depth, token in enumerate(sequence):
            if (node, token) not in children:
                children[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.depths.append(depth)
                tree.parents.append(node)
            node = children[node, token]
            path.append(node)
        tree.paths.append(path)
    return tree


def _visible(tree: _Tree, total: int) -> Bool[ndarray, "total total"]:
    """Return which tokens each token sees: itself and its path from the root. Padding sees only itself."""
    visible = np.eye(total, dtype=bool)
    # Parents come before their children, so their rows are complete.
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    return visible


def _pack(model: LoadedModel, features: dict[str, Tensor], trees: list[_Tree], replies: list[list[int]]) -> PackedBatch:
    total = max(len(tree.tokens) for tree in trees)
    ids, depths = torch.zeros(2, len(trees), total, dtype=torch.long)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        depths[row, : len(tree.tokens)] = torch.tensor(tree.depths)
    visible = torch.from_numpy(np.stack([_visible(tree, total) for tree in trees]))
    # An additive mask: every attention implementation that takes masks accepts this form.
    mask = torch.finfo(model.network.dtype).min * (~visible[:, None]).to(torch.float32)
    inputs = {name: value for name, value in features.items() if name not in (*REBUILT, TYPES)}
    inputs |= {"input_ids": ids, "attention_mask": mask, "position_ids": depths}
    if TYPES in features:
        inputs[TYPES] = torch.zeros_like(ids)
        inputs[TYPES][:, : features[TYPES].shape[1]] = features[TYPES] * features["attention_mask"]
    batch = Batch(inputs, total, [], replies, [], [])
    rows = [row for row, tree in enumerate(trees) for _ in tree.paths]
    return PackedBatch(batch, rows, [path for tree in trees for path in tree.paths])
