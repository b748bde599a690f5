r"""Many texts about one image in one row, so that the image is processed once.

The row is a tree of tokens: a prefix that sequences share appears once.

    USER: <image>×64 \n ┬ Describe the image … ASSISTANT: A dog .
                        └ Is there a ┬ cat in the image? ASSISTANT: ┬ No
                                     └ dog in the image? …          └ Yes

With an attention mask that shows each token only its own path, and with the position ids that it would have alone, its
states equal those of a row of its own, up to rounding. Not every architecture accepts such a mask: callers validate it
first.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from PIL.Image import Image
from torch import Tensor

from mmray.models.families import habits_of
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, Path, TokenSpan, run_processor, spans_of

REBUILT = ("input_ids", "attention_mask")
TYPES = "mm_token_type_ids"
"""Marks image positions: 0 for text."""
OWN_MASK = "token_type_ids"
"""From these a network makes its own mask; the one given here replaces them."""


def encode_shared(
    model: LoadedModel,
    prompts: Sequence[str],
    images: Sequence[Image],
    tokens: Sequence[list[int]],
    offsets: Sequence[list[tuple[int, int]]],
) -> Batch | None:
    """Build the batch in which consecutive samples with the same image object share a row; otherwise like `encode`.

    If their prompts differ and the family can't branch before the captions, only those with the same prompt share one.
    None if none share one, or the family has inputs that this can't rebuild.
    """
    by_image = [id(image) for image in images]
    for keys in (by_image, list(zip(by_image, prompts, strict=True))):
        groups = [list(numbers) for _, numbers in groupby(range(len(keys)), key=keys.__getitem__)]
        if len(groups) < len(keys) and model.parts.image_in_sequence:
            batch = _encode_groups(model, groups, prompts, images, tokens, offsets)
            if batch is not None:
                return batch
    return None


def _encode_groups(
    model: LoadedModel,
    groups: Sequence[list[int]],
    prompts: Sequence[str],
    images: Sequence[Image],
    tokens: Sequence[list[int]],
    offsets: Sequence[list[tuple[int, int]]],
) -> Batch | None:
    firsts = [group[0] for group in groups]
    if model.parts.image_before:
        return None
    features = run_processor(model, [prompts[first] for first in firsts], [images[first] for first in firsts])
    shape = features["input_ids"].shape
    aligned = {name for name, value in features.items() if value.shape[:2] == shape}
    if not aligned <= {*REBUILT, TYPES, OWN_MASK}:
        return None
    lengths = features["attention_mask"].sum(dim=1).tolist()
    before: list[list[int]] = []
    trees = []
    for row, group in enumerate(groups):
        first = features["input_ids"][row, : lengths[row]].tolist()
        own = _prompt_tokens(model, [prompts[number] for number in group], first)
        if own is None:
            return None
        before += own
        sequences = [[*prompt, *tokens[number]] for prompt, number in zip(own, group, strict=True)]
        if max(map(len, sequences)) > _window(model):
            return None
        trees.append(_tree(sequences))
    spans, starts = spans_of(model, before, tokens), [len(prompt) for prompt in before]
    paths = [Path(row, path) for row, tree in enumerate(trees) for path in tree.paths]
    blocks = _blocks(model, paths, spans, starts)
    if blocks is None:
        return None
    inputs = _inputs(model, features, trees, blocks)
    return Batch(inputs, inputs["input_ids"].shape[1], starts, list(tokens), list(offsets), spans, paths)


@dataclass(frozen=True)
class _Tree:
    """Tokens, each with its depth and parent (-1: none), and the path of each sequence through them."""

    tokens: list[int]
    depths: list[int]
    parents: list[int]
    paths: list[list[int]]


def _prompt_tokens(model: LoadedModel, prompts: Sequence[str], first: list[int]) -> list[list[int]] | None:
    """Return every prompt's tokens, with the image's as the processor wrote them into the `first` prompt.

    None if prompts differ, and the first is anything but its plain tokens with one placeholder replaced.
    """
    if len(set(prompts)) == 1:
        return [first] * len(prompts)
    placeholder = getattr(model.processor, "image_token", None)
    if not isinstance(placeholder, str):
        return None
    token = model.tokenizer.convert_tokens_to_ids(placeholder)
    bos = model.tokenizer.bos_token
    has_bos = bool(bos and prompts[0].startswith(bos))
    encoded: Any = model.tokenizer(list(prompts), add_special_tokens=not has_bos)
    plain: list[list[int]] = encoded["input_ids"]
    if any(tokens.count(token) != 1 for tokens in plain):
        return None
    start = plain[0].index(token)
    after = plain[0][start + 1 :]
    stop = len(first) - len(after)
    if first[:start] != plain[0][:start] or first[stop:] != after or not after:
        return None
    image = first[start:stop]
    indices = [tokens.index(token) for tokens in plain]
    return [[*tokens[:at], *image, *tokens[at + 1 :]] for tokens, at in zip(plain, indices, strict=True)]


def _window(model: LoadedModel) -> float:
    """Return the longest sequence of which every token sees all before it: that of layers with a sliding window."""
    return getattr(model.network.config.get_text_config(), "sliding_window", None) or float("inf")


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


def _blocks(
    model: LoadedModel, paths: Sequence[Path], spans: Sequence[TokenSpan], starts: Sequence[int]
) -> list[set[tuple[int, int]]] | None:
    """Return per row its blocks, as positions `[start, stop)`.

    None if the sequences of a row don't share their image, or not all of a block: it would see two continuations.
    """
    kind = habits_of(model.network.config).sees_later
    blocks: list[set[tuple[int, int]]] = [set() for _ in range(1 + paths[-1].row)]
    shared = [start if kind == "prompt" else 0 for start in starts]
    for span in spans:
        if span.modality == "image":
            shared[span.row] = max(shared[span.row], span.stop)
            if kind == "image":
                blocks[paths[span.row].row].add((span.start, span.stop))
    for path, stop, start in zip(paths, shared, starts, strict=True):
        # The first sequence of a row has the first positions.
        if path.positions[:stop] != list(range(stop)):
            return None
        if kind == "prompt":
            blocks[path.row].add((0, start))
    return blocks


def _inputs(
    model: LoadedModel,
    features: dict[str, Tensor],
    trees: Sequence[_Tree],
    blocks: Sequence[Collection[tuple[int, int]]],
) -> dict[str, Tensor]:
    """Return the inputs for rows that are trees, given the processor's for the first prompt of each."""
    total = max(len(tree.tokens) for tree in trees)
    ids = torch.zeros(len(trees), total, dtype=torch.long)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
    visible = [_visible(tree, total, own) for tree, own in zip(trees, blocks, strict=True)]
    # An additive mask: every attention implementation that takes masks accepts this form.
    mask = torch.finfo(model.network.dtype).min * (~torch.from_numpy(np.stack(visible))[:, None]).to(torch.float32)
    inputs = {name: value for name, value in features.items() if name not in (*REBUILT, TYPES, OWN_MASK)}
    inputs |= {"input_ids": ids, "attention_mask": mask, "position_ids": _position_ids(model, features, trees, total)}
    if TYPES in features:
        inputs[TYPES] = torch.zeros_like(ids)
        inputs[TYPES][:, : features[TYPES].shape[1]] = features[TYPES] * features["attention_mask"]
    return inputs


def _position_ids(
    model: LoadedModel, features: dict[str, Tensor], trees: Sequence[_Tree], total: int
) -> Int[Tensor, "*axis row position"]:
    """Return the position ids that each token would have in a row of its own."""
    rotary: Any = getattr(model.network.base_model, "get_rope_index", None)
    if rotary is None:
        depths, start = torch.zeros(len(trees), total, dtype=torch.long), habits_of(model.network.config).first_position
        for row, tree in enumerate(trees):
            depths[row, : len(tree.tokens)] = torch.tensor(tree.depths) + start
        return depths
    # Qwen-VL: an image's tokens have three coordinates (Hunyuan-VL's four), and text continues after the largest.
    given = {name: features[name] for name in inspect.signature(rotary).parameters if name in features}
    first = rotary(**given)[0]
    places = torch.zeros(len(first), len(trees), total, dtype=torch.long)
    for row, tree in enumerate(trees):
        length = int(features["attention_mask"][row].sum())
        largest = first[:, row, :length].amax(dim=0).tolist()
        for parent in tree.parents[length:]:
            largest.append(largest[parent] + 1)
        places[:, row, : len(largest)] = torch.tensor(largest)
        places[:, row, :length] = first[:, row, :length]
    return places


def _visible(tree: _Tree, total: int, blocks: Collection[tuple[int, int]]) -> Bool[ndarray, "total total"]:
    """Return which tokens each token sees: itself, its path from the root, its block. Padding sees only itself."""
    visible = np.eye(total, dtype=bool)
    # Parents come before their children, so their rows are complete.
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    for start, stop in blocks:
        visible[start:stop, start:stop] = True
    return visible
