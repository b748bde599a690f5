"""What an edit does to answers that it was not learned from: whether it takes, and what else it changes.

Greedy decoding gives the same reply if and only if each of its tokens stays the likeliest. So one pass over the
recorded states of the replies before the edit, over the whole vocabulary, says which replies stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmray.features.editing.candidates import CHUNK
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import ResumedForward, resume_all
from mmray.models.generation import token_text
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits

SHORT = 16
"""Most tokens of a short text-only reply."""


@dataclass(frozen=True)
class Bound:
    """How good a measure must be for an edit to count as done."""

    label: str
    limit: float
    side: Literal["least", "most"] = "least"

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bound."""
        return value >= self.limit if self.side == "least" else value <= self.limit


BOUNDS: dict[str, Bound] = {
    "reliability": Bound("images that it was made on: says what it should", 0.95),
    "image_generality": Bound("other images of the concept: says what it should", 0.85),
    "captions": Bound("captions of other images unchanged", 0.95),
    "answers": Bound("answers about other images unchanged", 0.95),
    "short_replies": Bound(f"text-only replies of up to {SHORT} tokens unchanged", 0.9),
    "long_replies": Bound("longer text-only replies unchanged", 0.75),
    "kl": Bound("KL on text, nats per token", 0.005, "most"),
    "perplexity": Bound("change of the perplexity of plain text", 0.01, "most"),
    "yes_ratio": Bound("change of the share of answers yes", 0.03, "most"),
}
"""By measure. A measure without data to measure it on is left out."""


@torch.no_grad()
def validate(
    model: LoadedModel,
    deltas: Deltas,
    new: Sequence[Example],
    held_out: Sequence[Example],
    kept: Mapping[str, Sequence[Example]],
) -> dict[str, float]:
    """Return the measures in BOUNDS: success on new answers, learned and held out, and changes of kept ones."""
    found = {"reliability": _success(model, deltas, new), "image_generality": _success(model, deltas, held_out)}
    changes = {kind: [_Change.of(part, deltas) for part, _ in resume_all(model, kept[kind], deltas)] for kind in kept}
    for kind in ("captions", "answers"):
        found[kind] = _mean([change.unchanged for change in changes.get(kind, [])])
    replies = changes.get("replies", [])
    found["short_replies"] = _mean([change.unchanged[change.lengths <= SHORT] for change in replies])
    found["long_replies"] = _mean([change.unchanged[change.lengths > SHORT] for change in replies])
    texts = changes.get("texts", [])
    found["kl"] = _mean([change.divergence for change in [*replies, *texts]])
    found["perplexity"] = abs(torch.tensor(_mean([change.surprise for change in texts])).exp().item() - 1)
    found["yes_ratio"] = abs(_yes(model, changes.get("answers", [])))
    # A mean over nothing is not a number, and not equal to itself.
    return {name: round(value, 4) for name, value in found.items() if value == value}


def broken(measures: Mapping[str, float]) -> list[str]:
    """Return the measures that are beyond their bound, in the order of BOUNDS."""
    return [name for name, bound in BOUNDS.items() if name in measures and not bound.holds(measures[name])]


def lines(measures: Mapping[str, float]) -> list[tuple[str, bool]]:
    """Return a line per measure for the terminal, and whether it is within its bound."""
    found = []
    for name, bound in BOUNDS.items():
        if name in measures:
            value, side = measures[name], f"at {bound.side}"
            shown = (f"{value:.4f}", f"{bound.limit:g}") if name == "kl" else (f"{value:.1%}", f"{bound.limit:.0%}")
            found.append((f"{bound.label}: {shown[0]} (bound: {side} {shown[1]})", bound.holds(value)))
    return found


@dataclass(frozen=True)
class _Change:
    """How a part's answers change."""

    unchanged: Float[Tensor, " answer"]
    """1 where the greedy reply stays the same to the letter."""
    lengths: Float[Tensor, " answer"]
    divergence: Float[Tensor, " position"]
    """KL(before ‖ after) in nats."""
    surprise: Float[Tensor, " position"]
    """By how much −log p of the answer's token rises."""
    first: tuple[list[int], list[int]]
    """The likeliest first token of each answer, before and after."""

    @classmethod
    def of(cls, part: ResumedForward, deltas: Deltas) -> _Change:
        """Compare a part's answers before and after."""
        states, columns = (part.states(None), part.states(deltas)), []
        for before, after, targets in zip(*(torch.split(one, CHUNK) for one in (*states, part.targets)), strict=True):
            old, new = (vocabulary_logits(part.model, one).log_softmax(1).to(targets.device) for one in (before, after))
            surprise = (old - new).gather(1, targets[:, None])[:, 0]
            columns.append((old.argmax(1), new.argmax(1), (old.exp() * (old - new)).sum(1), surprise))
        old_best, new_best, divergence, surprise = (torch.cat(column) for column in zip(*columns, strict=True))
        count = int(part.rows.max()) + 1
        lost = torch.zeros(count, device=part.rows.device).index_add(0, part.rows, (old_best != new_best).float())
        lengths = torch.bincount(part.rows, minlength=count)
        starts = lengths.cumsum(0) - lengths
        first = old_best[starts].tolist(), new_best[starts].tolist()
        return cls((lost == 0).float(), lengths, divergence, surprise, first)


def _success(model: LoadedModel, deltas: Deltas, answers: Sequence[Example]) -> float:
    """Return the share of answers whose new words, or first new token where nothing new is said, are the likeliest."""
    shares = []
    for part, rows in resume_all(model, answers, deltas):
        best = torch.cat([vocabulary_logits(model, one).argmax(1) for one in torch.split(part.states(deltas), CHUNK)])
        right = torch.split(best.to(part.targets.device) == part.targets, [len(example.tokens) for example in rows])
        shares.append(torch.stack([_said(row, example) for row, example in zip(right, rows, strict=True)]))
    return _mean(shares)


def _said(right: Bool[Tensor, " position"], example: Example) -> Float[Tensor, ""]:
    if example.rejected is None:
        return right.all().float()
    start = example.rejected[0]
    return right[start : max(example.no_repeat_from or 0, start + 1)].all().float()


def _yes(model: LoadedModel, changes: Sequence[_Change]) -> float:
    """Return by how much the share of answers that begin with yes rises."""
    before, after = ([token for change in changes for token in change.first[number]] for number in (0, 1))
    if not before:
        return float("nan")
    shares = [sum(token_text(model, token).casefold() == "yes" for token in row) / len(row) for row in (before, after)]
    return shares[1] - shares[0]


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat([part.cpu() for part in parts]).mean()) if parts else float("nan")
