"""What an edit does to answers that it was not learned from: whether it takes, and what else it changes.

Greedy decoding gives the same reply if and only if each of its tokens stays the likeliest. So one pass over the
recorded states of the replies before the edit, over the whole vocabulary, says which replies stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.editing.before_edit import BeforeEdit, Unedited, compared
from mmray.features.editing.bounds import BOUNDS, verdict
from mmray.features.editing.candidates import CHUNK
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import ResumedForward, resume_all
from mmray.models.generation import token_text
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits

SHORT = 16
"""Tokens of the beginning of a text-only reply, measured by itself."""


@torch.no_grad()
def validate(
    model: LoadedModel,
    deltas: Deltas,
    new: Sequence[Example],
    held_out: Sequence[Example],
    kept: Mapping[str, Sequence[Example]],
    *,
    gone: bool = False,
    before: BeforeEdit | None = None,
) -> dict[str, float]:
    """Return the measures in BOUNDS: success on new answers, learned and held out, and changes of kept ones.

    Success is that the new words are said; with `gone`, that the old one is not. A measure without data is left out.
    `before` is what tries with the same answers share.
    """
    before = before or BeforeEdit()
    found = {
        "reliability": _success(model, deltas, new, gone=gone),
        "image_generality": _success(model, deltas, held_out, gone=gone),
    }
    changes: dict[str, list[_Change]] = {}
    for kind in kept:
        parts = resume_all(model, kept[kind], deltas)
        pairs = zip(parts, before.answers(parts), strict=True)
        changes[kind] = [_Change.of(part, deltas, unedited) for (part, _), unedited in pairs]
    answers, replies, texts = (changes.get(kind, []) for kind in ("answers", "replies", "texts"))
    found["image_locality"] = _mean([change.unchanged for change in changes.get("captions", [])])
    found["image_locality_questions"] = _mean([change.unchanged for change in answers])
    found["text_only_16"] = _mean([change.same_start for change in replies])
    found["text_only_64"] = _mean([change.unchanged for change in replies])
    found["text_only_kl"] = _mean([change.divergence for change in replies])
    # The mean rise of −log p per token is the logarithm of the ratio of perplexities.
    found["perplexity_ratio"] = torch.tensor(_mean([change.surprise for change in texts])).exp().item()
    found["pope_yes_ratio_change"] = _yes(model, answers)
    # A mean over nothing is not a number, and not equal to itself.
    return {name: round(value, 4) for name, value in found.items() if value == value}


def broken(measures: Mapping[str, float]) -> list[str]:
    """Return the measures that are beyond their bound, in the order of BOUNDS."""
    return [bound["measure"] for bound in verdict(measures)["bounds"] if bound["passed"] is False]


def excess(measures: Mapping[str, float]) -> float:
    """Return by how much measures are beyond their bounds, in all; each as a fraction of its limit."""
    return sum(bound.excess(measures[bound.measure]) for bound in BOUNDS if bound.measure in measures)


@dataclass(frozen=True)
class _Change:
    """How a part's answers change."""

    unchanged: Float[Tensor, " answer"]
    """1 where the greedy reply stays the same to the letter."""
    same_start: Float[Tensor, " answer"]
    """1 where its first tokens do, at most SHORT."""
    divergence: Float[Tensor, " position"]
    """KL(before ‖ after) in nats, with all but the likeliest tokens as one."""
    surprise: Float[Tensor, " position"]
    """By how much −log p of the answer's token rises."""
    first: tuple[list[int], list[int]]
    """The likeliest first token of each answer, before and after."""

    @classmethod
    def of(cls, part: ResumedForward, deltas: Deltas, before: Unedited) -> _Change:
        """Compare a part's answers before and after."""
        columns = []
        numbers = torch.arange(len(part.targets), device=part.targets.device)
        for states, some in zip(*(torch.split(one, CHUNK) for one in (part.states(deltas), numbers)), strict=True):
            logits = vocabulary_logits(part.model, states).to(some.device)
            target, log_probs = compared(logits, part.targets[some], before.tokens[some])
            old = before.log_probs[some]
            columns.append((logits.argmax(1), (old.exp() * (old - log_probs)).sum(1), before.target[some] - target))
        best, divergence, surprise = (torch.cat(column) for column in zip(*columns, strict=True))
        lengths = torch.bincount(part.rows)
        starts = lengths.cumsum(0) - lengths
        differs = before.tokens[:, 0] != best
        early = numbers - starts[part.rows] < SHORT
        unchanged, same_start = (
            (torch.zeros_like(divergence[: len(lengths)]).index_add(0, part.rows, lost.float()) == 0).float()
            for lost in (differs, differs & early)
        )
        first = before.tokens[starts, 0].tolist(), best[starts].tolist()
        return cls(unchanged, same_start, divergence, surprise, first)


def _success(model: LoadedModel, deltas: Deltas, answers: Sequence[Example], *, gone: bool) -> float:
    """Return the share of answers whose new words, or first new token where nothing new is said, are the likeliest.

    With `gone`, that of answers whose old token is no longer the likeliest.
    """
    shares = []
    for part, rows in resume_all(model, answers, deltas):
        best = torch.cat([vocabulary_logits(model, one).argmax(1) for one in torch.split(part.states(deltas), CHUNK)])
        said = torch.split(best.to(part.targets.device), [len(example.tokens) for example in rows])
        shares.append(
            torch.tensor([_succeeds(row, example, gone=gone) for row, example in zip(said, rows, strict=True)]).float()
        )
    return _mean(shares)


def _succeeds(said: Int[Tensor, " position"], example: Example, *, gone: bool) -> bool:
    right = said == torch.tensor(example.tokens, device=said.device)
    if example.rejected is None:
        return bool(right.all())
    start, old = example.rejected
    if gone:
        return bool(said[start] != old)
    return bool(right[start : max(example.no_repeat_from or 0, start + 1)].all())


def _yes(model: LoadedModel, changes: Sequence[_Change]) -> float:
    """Return by how much the share of answers that begin with yes rises."""
    before, after = ([token for change in changes for token in change.first[number]] for number in (0, 1))
    if not before:
        return float("nan")
    shares = [sum(token_text(model, token).casefold() == "yes" for token in row) / len(row) for row in (before, after)]
    return shares[1] - shares[0]


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat([part.cpu() for part in parts]).mean()) if parts else float("nan")
