"""Move a vision embedding from one concept to another along the detector's gradient, and by as much at random.

Giulivi & Boracchi (2024) take one step along the sign of the gradient, of size 1 in every entry: `sign_step`. `moved`
has a set norm, and changes only patches where the source is seen. Either is compared with controls of the same norm.

The gradient is multiplied by the covariance of embeddings: the steepest direction among those that images vary in. The
plain gradient finds changes that fool the detector alone, unless it was trained against them (`jobs.demo.heads`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mmray.detector.boxes import centres_inside
from mmray.detector.joint import JointModel

SEEN_SHARE = 0.5
"""A box shows the concept if its confidence is at least this fraction of the highest."""
PATH_LENGTH = 6.0
"""Length of all steps together, relative to the bound of the norm. A path that turns needs more than 1."""
COPIES, NOISE = 4, 0.5
"""A gradient is the mean over this many noisy copies; noise is relative to the embeddings' standard deviation. As in
SmoothGrad, averaging removes directions that depend on tiny details."""
LOGIT_WEIGHT = 0.1
"""Weight of the logits next to log-probabilities, whose gradient vanishes once the detector is sure."""

EXTREME = 1e6
"""Logits that the published step aims at: minus this for the source, this for the target."""

Embedding = Float[Tensor, "row position width"]
Covariance = Float[Tensor, "width width"]


def covariance(embedding: Embedding, skipped: int) -> Covariance:
    """Return the covariance of embeddings' patches, without the first `skipped` positions (CLS)."""
    patches = embedding[:, skipped:].flatten(0, 1).float()
    return torch.cov(patches.T)


def shown(
    joint: JointModel, embedding: Embedding, word: str
) -> tuple[Bool[Tensor, "row box"], Bool[Tensor, "row position 1"]]:
    """Return the boxes in which the detector sees a word, and the patches that they touch.

    Boxes count from half the highest confidence on.
    """
    side, skipped = joint.tower.side, joint.tower.skipped
    with torch.no_grad():
        found = joint.detect(embedding, [word])
    confidence = found.logits[..., 0].sigmoid()
    chosen = confidence >= SEEN_SHARE * confidence.amax(dim=1, keepdim=True)
    # Grown by half a patch on each side, a box contains the centres of all patches that it touches.
    grown = torch.cat([found.boxes[..., :2] - 0.5 / side, found.boxes[..., 2:] + 1 / side], dim=-1)
    touched = (centres_inside(grown, side) & chosen[..., None]).any(dim=1)
    return chosen, functional.pad(touched, (skipped, 0))[..., None]


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
    """Return the embedding moved from a source concept towards a target.

    A step follows the gradient of log p(target) in the boxes where the source was seen, plus log(1 − p(source)) in all
    boxes, plus a tenth of the difference of logits. Only patches under the source's boxes move. The whole move is
    bounded by `norm`, a fraction of the embedding's own norm over the patches; a single step has that length.
    `varying` is the covariance of embeddings; `plain` leaves it out of the gradient.
    """
    start, skipped = embedding.detach(), joint.tower.skipped
    boxes, movable = shown(joint, start, source)
    boxes = boxes.repeat(COPIES, 1)
    bound = norm * _length(start[:, skipped:])
    step = bound if steps == 1 else PATH_LENGTH * bound / steps
    deviation = NOISE * varying.diagonal().mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    move = torch.zeros_like(start)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            copies = (start + move).repeat(COPIES, 1, 1)
            leaf = (copies + deviation * _noise(copies, generator)).detach().requires_grad_()
            old, new = joint.detect(leaf, [source, target]).logits.unbind(dim=-1)
            # The logits keep a move going where the detector is sure already and the language model may not be.
            gain = (functional.logsigmoid(new) + LOGIT_WEIGHT * (new - old)) * boxes + functional.logsigmoid(-old)
            # Rows don't depend on each other, so the gradient of the sum holds the gradient of each.
            (gradient,) = torch.autograd.grad(gain.sum(), leaf)
            gradient = gradient.reshape(COPIES, *start.shape).mean(dim=0) * movable
            direction = gradient if plain else (gradient.float() @ varying).to(gradient.dtype)
            move = move + step * _direction(direction, skipped)
            # Back onto the ball of the bound after each step, as in projected gradient descent.
            move = move * (bound / _length(move).clamp(min=1e-12)).clamp(max=1.0)
    return start + move


def sign_step(joint: JointModel, embedding: Embedding, source: str, target: str, size: float) -> Embedding:
    """Return the embedding with every entry, CLS included, moved by `size` along the gradient's sign.

    As published (FGSM): the gradient is that of the mean squared error between the logits of all boxes and −EXTREME for
    the source, EXTREME for the target.
    """
    start = embedding.detach()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = start.clone().float().requires_grad_()
        logits = joint.detect(leaf, [source, target]).logits
        wanted = logits.new_tensor([-EXTREME, EXTREME]).expand_as(logits)
        (gradient,) = torch.autograd.grad(functional.mse_loss(logits, wanted), leaf)
    return start - size * gradient.sign().to(start.dtype)


def sign_step_at_random(embedding: Embedding, size: float, seed: int) -> Embedding:
    """Return the embedding with every entry moved by `size` in a random direction: the control of `sign_step`."""
    noise = _noise(embedding, torch.Generator().manual_seed(seed))
    moved: Embedding = embedding + size * noise.sign()
    return moved


def rescaled(embedding: Embedding, other: Embedding, reference: Embedding) -> Embedding:
    """Return the move from the embedding to `other`, scaled to the length of the move to `reference`."""
    move = other - embedding
    result: Embedding = embedding + move * (_length(reference - embedding) / _length(move).clamp(min=1e-12))
    return result


def moved_at_random(
    joint: JointModel,
    embedding: Embedding,
    reference: Embedding,
    seed: int,
    *,
    in_place: bool = False,
    varying: Covariance | None = None,
) -> Embedding:
    """Return the embedding moved in a random direction by the length of the move to `reference`.

    `in_place`: by the reference's length in each patch, instead of over all patches alike. `varying`: drawn with this
    covariance, instead of white.
    """
    move = reference - embedding
    noise = _noise(move, torch.Generator().manual_seed(seed))
    if varying is not None:
        # The symmetric root. Covariances of few patches are singular, and rounding makes some eigenvalues negative.
        values, vectors = torch.linalg.eigh(varying.double())
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        noise = (noise.double() @ root).to(move.dtype)
    if not in_place:
        return embedding + _direction(noise, joint.tower.skipped) * _length(move)
    placed: Embedding = embedding + functional.normalize(noise, dim=2) * move.norm(dim=2, keepdim=True)
    return placed


def relative_norms(embedding: Embedding, other: Embedding, skipped: int) -> Sequence[tuple[float, float]]:
    """Return each row's L2 norm of the move, and its fraction of the embedding's own norm over the patches."""
    moves, whole = _length(other - embedding).flatten(), _length(embedding[:, skipped:]).flatten()
    return list(zip(moves.tolist(), (moves / whole).tolist(), strict=True))


def _noise(like: Embedding, generator: torch.Generator) -> Embedding:
    # Drawn on the CPU: a GPU's generator gives other numbers for the same seed.
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _direction(values: Embedding, skipped: int) -> Embedding:
    """Return each row scaled to length 1, with zeros before the patches."""
    kept = torch.cat([torch.zeros_like(values[:, :skipped]), values[:, skipped:]], dim=1)
    # Clamped: where no patch may move the length is 0, and the direction must stay 0 instead of NaN.
    direction: Tensor = kept / _length(kept).clamp(min=1e-12)
    return direction


def _length(values: Embedding) -> Float[Tensor, "row 1 1"]:
    length: Tensor = values.flatten(1).norm(dim=1)[:, None, None]
    return length
