"""What the model says before an edit, computed once for all of its tries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.editing.candidates import CHUNK, Candidates, candidates, log_rest
from mmray.features.editing.resumed_forward import ResumedForward
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits

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


@dataclass
class BeforeEdit:
    """What tries of one edit share. Later ones must be given the same answers as the first."""

    unedited: dict[str, list[Unedited]] = field(default_factory=dict)
    """By kind of kept answers, one per part."""
    chosen: tuple[Candidates, list[Float[Tensor, " position"]]] | None = None

    def answers(self, kind: str, parts: Sequence[ResumedForward]) -> list[Unedited]:
        """Return what the model says at these parts of a kind's held-out answers."""
        if kind not in self.unedited:
            self.unedited[kind] = [Unedited.of(part) for part in parts]
        return self.unedited[kind]

    def candidates(
        self, model: LoadedModel, parts: Iterable[ResumedForward], words: Iterable[int]
    ) -> tuple[Candidates, list[Float[Tensor, " position"]]]:
        """Return the candidates at these parts of the answers to learn from, as `candidates` does."""
        if self.chosen is None:
            self.chosen = candidates(model, parts, words)
        return self.chosen
