"""Learn deltas of W_out rows by gradient descent: say the new, no longer the old, and leave all else as it was.

The loss, over answers that are to change (new) and answers that are to stay (kept), each summed over an answer's tokens
and averaged over answers (Pan et al. 2024 with the guards of FiNE, Pan et al. 2025):

      − log p(new answer)                     every token of it, sub-tokens and end included
      − log (1 − p(old token))                where the new answer leaves the old one
      − log (1 − p(new words' first token))   behind the new words: not again
    + keep · KL(before ‖ now)                 at every token of the kept answers
    + size · Σ ‖Δ row‖² / mean ‖W_out row‖²
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.editing.deltas import Deltas
from mmray.editing.material import Example, batches
from mmray.editing.tail import Tail, joined, tail
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch

BATCHES = 2
"""Batches of each kind a step, where the later blocks have to be run again."""


@dataclass(frozen=True)
class Course:
    """How to learn."""

    steps: int = 60
    rate: float = 0.25
    """Adam's step, in units of the root mean square of a layer's W_out."""
    keep: float = 10.0
    size: float = 5e-4
    places: int = 3000
    """Of an edit of the last layer, the places of the kept answers that the edited neurons are most active at."""
    seed: int = 0


@dataclass(frozen=True)
class _New:
    """Answers that are to change: −1 where a place avoids, or must not repeat, no token."""

    tail: Tail
    avoided: Int[Tensor, " place"]
    repeated: Int[Tensor, " place"]


@dataclass(frozen=True)
class _Kept:
    """Answers that are to stay, and what was said before."""

    tail: Tail
    before: Float[Tensor, "place vocabulary"]
    answers: int


def learn(
    model: LoadedModel, deltas: Deltas, new: Sequence[Example], keep: Sequence[Example], course: Course
) -> list[float]:
    """Change the deltas so that the model gives the new answers and keeps the others; return the loss of each step."""
    groups = [{"params": learnt, "lr": course.rate * deltas.scales[layer]} for layer, learnt in deltas.learnt.items()]
    optimizer = torch.optim.Adam(groups)
    changing = [_New(part, *_bans(model, rows)) for part, rows in _tails(model, new, deltas)]
    staying = [_kept(part, course.places) for part, _ in _tails(model, keep, deltas)]
    draw = random.Random(course.seed)
    course_of_loss = []
    for _ in range(course.steps):
        optimizer.zero_grad()
        some = draw.sample(changing, min(BATCHES, len(changing)))
        loss = sum(_say(part, deltas) for part in some) / sum(_answers(part.tail) for part in some)
        loss = loss + course.size * _size(deltas)
        if staying:
            others = draw.sample(staying, min(BATCHES, len(staying)))
            changed = sum(_change(part, deltas) for part in others)
            loss = loss + course.keep * changed / sum(part.answers for part in others)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        course_of_loss.append(loss.item())
    return course_of_loss


def _size(deltas: Deltas) -> Float[Tensor, ""]:
    """Return Σ ‖Δ row‖² over the mean ‖W_out row‖² of its layer."""
    parts = [
        rows.square().sum() / (deltas.scales[layer] ** 2 * rows.shape[1])
        for layer in deltas.units
        for rows in (deltas.rows(layer),)
    ]
    return torch.stack(parts).sum()


def _say(new: _New, deltas: Deltas) -> Float[Tensor, ""]:
    """Return the loss of the answers that are to change, summed."""
    log_probs = new.tail.logits(deltas).log_softmax(1)
    loss = -log_probs.gather(1, new.tail.targets[:, None]).sum()
    for tokens in (new.avoided, new.repeated):
        places = (tokens >= 0).nonzero()[:, 0]
        said = log_probs[places, tokens[places]].exp()
        loss = loss - torch.log1p(-said.clamp(max=1 - 1e-6)).sum()
    return loss


def _change(kept: _Kept, deltas: Deltas) -> Float[Tensor, ""]:
    """Return the divergence of what is said now from what was said before, summed over places."""
    now = kept.tail.logits(deltas).log_softmax(1)
    return (kept.before.exp() * (kept.before - now)).sum()


@torch.no_grad()
def _kept(part: Tail, most: int) -> _Kept:
    answers = _answers(part)
    if not part.later and len(part.targets) > most:
        part = part.at(part.activation.norm(dim=1).topk(most).indices)
    return _Kept(part, part.logits().log_softmax(1), answers)


def _answers(part: Tail) -> int:
    return int(part.rows.max()) + 1


def batched(model: LoadedModel, examples: Sequence[Example]) -> list[tuple[Batch, list[Example]]]:
    """Return the examples as batches of like length, with the examples of each batch's rows."""
    ordered = sorted(examples, key=lambda example: (example.image is None, len(example.tokens)))
    found, start = [], 0
    for batch in batches(model, ordered):
        rows = len(batch.tokens)
        found.append((batch, ordered[start : start + rows]))
        start += rows
    return found


def _bans(model: LoadedModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return, place by place, the token that is to be avoided and the one that must not come again."""
    avoided, repeated = [], []
    for example in examples:
        first = example.avoided[0] if example.avoided else None
        for place, token in enumerate(example.tokens):
            avoided.append(example.avoided[1] if example.avoided and place == first else -1)
            again = example.said is not None and first is not None and place >= example.said
            word = example.tokens[first] if again and first is not None else -1
            repeated.append(word if word != token else -1)
    return torch.tensor(avoided, device=model.device), torch.tensor(repeated, device=model.device)


def _tails(model: LoadedModel, examples: Sequence[Example], deltas: Deltas) -> list[tuple[Tail, list[Example]]]:
    """Return the examples behind the first edited MLP: in one piece where no later block has to be run."""
    parts = [(tail(model, batch, deltas), rows) for batch, rows in batched(model, examples)]
    if len(parts) < 2 or parts[0][0].later:
        return parts
    return [(joined([part for part, _ in parts]), [row for _, rows in parts for row in rows])]
