"""Move a vision embedding from one concept to another along the detector's gradient, and by as much at random.

Giulivi & Boracchi 2024 take one step of the gradient's sign, of size 1 in every entry; here the whole move has a norm
that is set, entries that the language model never sees (CLS) stay as they are, and there are controls of equal norm.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mmray.perception.joint import JointModel

SHOWS = 0.5
"""Part of the highest confidence above which a box counts as one where the concept is."""
AHEAD = 2.5
"""Lengths of the steps together, in parts of the norm: a way that turns still gets to its bound."""

Embedding = Float[Tensor, "row place width"]


def boxes_of(joint: JointModel, embedding: Embedding, word: str) -> Bool[Tensor, "row box"]:
    """Return the boxes where the detector sees a word best: the highest, and those at least half as confident."""
    with torch.no_grad():
        confidence = joint.detect(embedding, [word]).logits[..., 0].sigmoid()
    return confidence >= SHOWS * confidence.amax(dim=1, keepdim=True)


def confidences(joint: JointModel, embedding: Embedding, words: list[str]) -> Float[Tensor, "row query"]:
    """Return how sure the detector is of each word: the highest probability of any box."""
    with torch.no_grad():
        sure: Tensor = joint.detect(embedding, words).logits.sigmoid().amax(dim=1)
    return sure


def moved(
    joint: JointModel, embedding: Embedding, source: str, target: str, norm: float, steps: int
) -> tuple[Embedding, Float[Tensor, " row"]]:
    """Return the embedding moved from a concept towards another, and the L2 norm of each row's move.

    Each of the steps goes along the gradient of log p(target) − log p(source), summed over the boxes where the source
    was seen; the whole move is kept to `norm`, a part of the embedding's own norm over the patches. One step goes all
    the way along the first gradient.
    """
    start = embedding.detach()
    boxes = boxes_of(joint, start, source)
    bound = norm * _length(start[:, joint.sight.skipped :])
    length = bound if steps == 1 else AHEAD * bound / steps
    move = torch.zeros_like(start)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            leaf = (start + move).clone().requires_grad_()
            logits = functional.logsigmoid(joint.detect(leaf, [source, target]).logits)
            gain = ((logits[..., 1] - logits[..., 0]) * boxes).sum()
            (gradient,) = torch.autograd.grad(gain, leaf)
            move = _bounded(move + length * _direction(gradient, joint.sight.skipped), bound)
    return start + move, _length(move).flatten()


def moved_at_random(
    joint: JointModel, embedding: Embedding, like: Embedding, seed: int, *, everywhere: bool
) -> Embedding:
    """Return the embedding moved as far as another move, `like` its outcome, in a direction drawn at random.

    `everywhere`: over all patches alike. Else as far in each patch as the other move went there.
    """
    random = torch.Generator().manual_seed(seed)
    move = like - embedding
    noise = torch.randn(move.shape, generator=random).to(move.device, move.dtype)
    if everywhere:
        return embedding + _direction(noise, joint.sight.skipped) * _length(move)
    placed: Embedding = embedding + functional.normalize(noise, dim=2) * move.norm(dim=2, keepdim=True)
    return placed


def _direction(values: Embedding, skipped: int) -> Embedding:
    """Return each row at length 1, nothing before the patches."""
    kept = torch.cat([torch.zeros_like(values[:, :skipped]), values[:, skipped:]], dim=1)
    direction: Tensor = kept / _length(kept).clamp(min=1e-12)
    return direction


def _length(values: Embedding) -> Float[Tensor, "row 1 1"]:
    length: Tensor = values.flatten(1).norm(dim=1)[:, None, None]
    return length


def _bounded(move: Embedding, bound: Float[Tensor, "row 1 1"]) -> Embedding:
    return move * (bound / _length(move).clamp(min=1e-12)).clamp(max=1.0)
