"""What the model says before an edit, computed once for all of its tries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.editing.candidates import CHUNK, Candidates, candidates, log_rest
from mmray.features.editing.dataset import Example
from mmray.features.editing.resumed_forward import ResumedForward
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits

if TYPE_CHECKING:
    from mmray.features.editing.patch import Detectors

COMPARED = 128
"""Likeliest tokens of each position that a divergence goes through one by one. The others count as one token, which can
only lower it."""


@dataclass(frozen=True)
class Unedited:
    """A part's answers before the edit, position by position."""

    target: Float[Tensor, " position"]
    """Log-probability of the answer's token."""
    tokens: Int[Tensor, "position compared"]
    """The likeliest, the likeliest first."""
    log_probs: Float[Tensor, "position entry"]
    """Of these tokens, and of all others together."""

    @classmethod
    def of(cls, part: ResumedForward) -> Unedited:
        """Return what the model says at the part's positions without the edit."""
        columns = []
        states = torch.split(part.states(None), CHUNK)
        for some, targets in zip(states, torch.split(part.targets, CHUNK), strict=True):
            logits = vocabulary_logits(part.model, some)
            tokens = logits.topk(min(COMPARED, logits.shape[1]), dim=1).indices
            target, log_probs = compared(logits, targets.to(logits.device), tokens)
            columns.append((target, tokens, log_probs))
        target, tokens, log_probs = (torch.cat(column).to(part.targets.device) for column in zip(*columns, strict=True))
        return cls(target, tokens, log_probs)


def compared(
    logits: Float[Tensor, "position vocabulary"],
    targets: Int[Tensor, " position"],
    tokens: Int[Tensor, "position compared"],
) -> tuple[Float[Tensor, " position"], Float[Tensor, "position entry"]]:
    """Return log-probabilities: of the targets, and of these tokens with all others together."""
    total = logits.logsumexp(1)
    some = logits.gather(1, tokens)
    entries = torch.cat([some, log_rest(total, some)[:, None]], dim=1)
    return logits.gather(1, targets[:, None])[:, 0] - total, entries - total[:, None]


Part = tuple[ResumedForward, Sequence[Example]]
Rows = tuple[tuple[Example, ...], ...]
"""The answers of each part, in order. Methods differ in the kinds that they keep, and in how they cut them."""


@dataclass
class BeforeEdit:
    """What tries of one edit, and methods that make the same edit, share. All must be given the same answers."""

    unedited: dict[Rows, list[Unedited]] = field(default_factory=dict)
    """By the answers of each part: one per part."""
    chosen: dict[tuple[tuple[str, ...], Rows], tuple[Candidates, list[Float[Tensor, " position"]]]] = field(
        default_factory=dict
    )
    """By the kinds of kept answers that are learned from, and the answers of all parts."""
    detectors: Detectors | None = None
    """Of patches."""

    def answers(self, parts: Sequence[Part]) -> list[Unedited]:
        """Return what the model says at these parts of held-out answers."""
        key = _rows(parts)
        if key not in self.unedited:
            self.unedited[key] = [Unedited.of(part) for part, _ in parts]
        return self.unedited[key]

    def candidates(
        self, model: LoadedModel, kinds: Iterable[str], parts: Sequence[Part], words: Iterable[int]
    ) -> tuple[Candidates, list[Float[Tensor, " position"]]]:
        """Return the candidates at these parts of the answers to learn from, as `candidates` does."""
        key = tuple(kinds), _rows(parts)
        if key not in self.chosen:
            self.chosen[key] = candidates(model, [part for part, _ in parts], words)
        return self.chosen[key]


def _rows(parts: Sequence[Part]) -> Rows:
    return tuple(tuple(rows) for _, rows in parts)
