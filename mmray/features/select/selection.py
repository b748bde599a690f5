"""Choose a concept's neurons together: the noun goes with them, and other nouns stay, as far as first order tells.

A ranking takes neurons one by one: fifty that each hurt the same other noun a little hurt it badly together. Here the
effects of a few hundred candidates at every occurrence are added up over the set that is chosen:

    Σ effect at the concept's places - UNCERTAINTY · Σ rms effect elsewhere - HARM · mean fall of the other nouns

is made as large as a set of `count` neurons makes it, by Frank-Wolfe over weights between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

HARM = 5.0
"""Logits of the own noun that a nat of other nouns' mean log-probability is worth."""
UNCERTAINTY = 0.75
"""Part of a neuron's root mean square effect elsewhere that is held against it, for places that were not looked at."""
ROBUST = 1.0
"""Log-odds above which another noun is taken to be no safer: no set may rest on how sure the model happens to be."""
HELP = 0.5
"""What raising another noun costs, in parts of what lowering it would."""
HEAD_START, ENOUGH = 4.0, 12.0
"""Logits before it gives way at which an own place begins to count in full (half before), and beyond which no more."""
STEPS = 200


@dataclass(frozen=True)
class CandidateSums:
    """What ablating each candidate takes from log-odds, to first order, at the concept's places and at other nouns'."""

    own: Float[Tensor, "place candidate"]
    own_log_odds: Float[Tensor, " place"]
    others: Float[Tensor, "other candidate"]
    other_log_odds: Float[Tensor, " other"]
    elsewhere: Float[Tensor, " candidate"]
    """Root mean square of the score `effect` at the other places."""


def choose(effects: CandidateSums, count: int) -> Float[Tensor, " count"]:
    """Return the indices of the candidates in the set of `count`, of the highest weight first.

    Deterministic: no draw is made. Takes STEPS products with the matrix of others, a second for a thousand places.
    """
    candidates = effects.own.shape[1]
    count = min(count, candidates)
    margin = effects.other_log_odds.clamp(-6.0, ROBUST)
    own_margin = effects.own_log_odds.clamp(-6.0, ENOUGH)
    weights = torch.full((candidates,), count / candidates)
    for step in range(STEPS):
        left = margin - effects.others @ weights
        slope = torch.sigmoid(-left) * torch.where(left < margin, 1.0, -HELP)
        beyond = effects.own @ weights - own_margin
        pull = torch.sigmoid(HEAD_START + beyond).clamp(min=0.5) * (beyond < ENOUGH)
        gradient = effects.own.T @ pull / len(pull) - UNCERTAINTY * effects.elsewhere
        if len(left):
            gradient = gradient - HARM * (effects.others.T @ slope) / len(left)
        corner = torch.zeros(candidates)
        corner[gradient.topk(count).indices] = 1.0
        weights += 2.0 / (step + 3) * (corner - weights)
    return weights.topk(count).indices


def expected(effects: CandidateSums, chosen: Sequence[int]) -> tuple[float, float]:
    """Return, in nats to first order, by how much the set lowers its own noun and the others."""
    falls = []
    for part, log_odds in ((effects.own, effects.own_log_odds), (effects.others, effects.other_log_odds)):
        after = log_odds - part[:, list(chosen)].sum(dim=1)
        falls.append(float((logsigmoid(log_odds) - logsigmoid(after)).mean()) if len(part) else 0.0)
    return falls[0], falls[1]
