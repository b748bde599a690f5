"""Move a vision embedding from one concept to another along the detector's gradient, and by as much at random.

Giulivi & Boracchi 2024 take one step of the gradient's sign, of size 1 in every entry. Here the whole move has a norm
that is set, only patches where the source is seen move, and there are controls of equal norm. The gradient is that of
embeddings as they vary: multiplied by their covariance, which makes it the steepest way among moves that images make. A
plain gradient finds what fools the detector alone, unless that was hardened (`jobs.demo.heads`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mmray.detector.boxes import centres_inside
from mmray.detector.joint import JointModel, Judge

SHOWS = 0.5
"""Part of the highest confidence above which a box counts as one where the concept is."""
AHEAD = 6.0
"""Lengths of the steps together, in parts of the norm: a way that turns still gets on."""
COPIES, NOISE = 4, 0.5
"""Copies of the embedding, and the noise in each in parts of an embedding's own deviation, that a gradient is the mean
of: what is left is what does not hang on small things."""
BEYOND = 0.1
"""Weight of the two logits themselves, on top of their log-probabilities, which end where the detector is sure."""

Embedding = Float[Tensor, "row place width"]
Covariance = Float[Tensor, "width width"]


def covariance(embedding: Embedding, skipped: int) -> Covariance:
    """Return how embeddings' patches vary."""
    patches = embedding[:, skipped:].flatten(0, 1).float()
    return torch.cov(patches.T)


def shown(
    joint: JointModel, embedding: Embedding, word: str
) -> tuple[Bool[Tensor, "row box"], Bool[Tensor, "row place 1"]]:
    """Return where the detector sees a word best: the boxes, the highest and those at least half as confident, and the
    patches that one of them touches.
    """
    side, skipped = joint.sight.side, joint.sight.skipped
    with torch.no_grad():
        found = joint.detect(embedding, [word])
    confidence = found.logits[..., 0].sigmoid()
    chosen = confidence >= SHOWS * confidence.amax(dim=1, keepdim=True)
    grown = torch.cat([found.boxes[..., :2] - 0.5 / side, found.boxes[..., 2:] + 1 / side], dim=-1)
    touched = (centres_inside(grown, side) & chosen[..., None]).any(dim=1)
    return chosen, functional.pad(touched, (skipped, 0))[..., None]


def confidences(judge: Judge, embedding: Embedding, words: list[str]) -> Float[Tensor, "row query"]:
    """Return how sure the detector is of each word: the highest probability of any box."""
    with torch.no_grad():
        sure: Tensor = judge.detect(embedding, words).logits.sigmoid().amax(dim=1)
    return sure


def moved(
    joint: JointModel,
    embedding: Embedding,
    source: str,
    target: str,
    norm: float,
    steps: int,
    varying: Covariance,
    *,
    plain: bool = False,
    seed: int = 0,
) -> Embedding:
    """Return the embedding moved from a concept towards another.

    Each of the steps goes along the gradient of log p(target) where the source was seen, and log(1 − p(source)) of all
    boxes; a tenth of the two logits keeps it going where the detector is sure already, and the language model may not
    be. Only the patches under the boxes where the source was seen move. The whole move is kept to `norm`, a part of the
    embedding's own norm over the patches. One step goes all the way along the first gradient. `plain`: along the
    gradient as it is, not of embeddings as they vary.
    """
    start, skipped = embedding.detach(), joint.sight.skipped
    boxes, movable = shown(joint, start, source)
    boxes = boxes.repeat(COPIES, 1)
    bound = norm * _length(start[:, skipped:])
    length = bound if steps == 1 else AHEAD * bound / steps
    deviation = NOISE * varying.diagonal().mean().sqrt()
    random = torch.Generator().manual_seed(seed)
    move = torch.zeros_like(start)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            copies = (start + move).repeat(COPIES, 1, 1)
            leaf = (copies + deviation * _noise(copies, random)).detach().requires_grad_()
            old, new = joint.detect(leaf, [source, target]).logits.unbind(dim=-1)
            gain = (functional.logsigmoid(new) + BEYOND * (new - old)) * boxes + functional.logsigmoid(-old)
            (gradient,) = torch.autograd.grad(gain.sum(), leaf)
            gradient = gradient.reshape(COPIES, *start.shape).mean(dim=0) * movable
            way = gradient if plain else (gradient.float() @ varying).to(gradient.dtype)
            move = _bounded(move + length * _direction(way, skipped), bound)
    return start + move


def as_far(embedding: Embedding, there: Embedding, like: Embedding) -> Embedding:
    """Return a move, `there` its outcome, cut or stretched to the length of another, `like` its outcome."""
    move = there - embedding
    stretched: Embedding = embedding + move * (_length(like - embedding) / _length(move).clamp(min=1e-12))
    return stretched


def moved_at_random(
    joint: JointModel,
    embedding: Embedding,
    like: Embedding,
    seed: int,
    *,
    in_place: bool = False,
    varying: Covariance | None = None,
) -> Embedding:
    """Return the embedding moved as far as another move, `like` its outcome, in a direction drawn at random.

    `in_place`: as far in each patch as the other move went there; else over all patches alike. `varying`: drawn as
    embeddings vary; else in any direction.
    """
    move = like - embedding
    noise = _noise(move, torch.Generator().manual_seed(seed))
    if varying is not None:
        values, vectors = torch.linalg.eigh(varying.double())
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        noise = (noise.double() @ root).to(move.dtype)
    if not in_place:
        return embedding + _direction(noise, joint.sight.skipped) * _length(move)
    placed: Embedding = embedding + functional.normalize(noise, dim=2) * move.norm(dim=2, keepdim=True)
    return placed


def relative_norms(embedding: Embedding, there: Embedding, skipped: int) -> Sequence[tuple[float, float]]:
    """Return the L2 norm of each row's move, and what part of the embedding's own norm over the patches it is."""
    moves, whole = _length(there - embedding).flatten(), _length(embedding[:, skipped:]).flatten()
    return list(zip(moves.tolist(), (moves / whole).tolist(), strict=True))


def _noise(like: Embedding, random: torch.Generator) -> Embedding:
    return torch.randn(like.shape, generator=random).to(like.device, like.dtype)


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
