"""Joint choice of a concept's neurons: to first order, ablating them removes the noun and keeps other nouns.

A ranking judges neurons one by one, but fifty that each hurt the same other noun a little hurt it badly together. So
the effects of a few hundred candidates at every occurrence are added up over the chosen set. The objective

    Σ effect at the concept's positions - UNCERTAINTY · Σ RMS effect elsewhere - HARM · mean fall of the other nouns

is maximised over sets of `count` neurons, by the Frank-Wolfe algorithm over weights between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

HARM = 5.0
"""Logits of the own noun that one nat of other nouns' mean log-probability is worth."""
UNCERTAINTY = 0.75
"""Weight of a neuron's RMS effect elsewhere, a penalty that stands for nouns outside the samples."""
ROBUST = 1.0
"""Cap on the log-odds of other nouns, so that no set relies on how confident the model happens to be."""
HELP = 0.5
"""Cost of raising another noun, as a fraction of the cost of lowering it."""
HEAD_START, ENOUGH = 4.0, 12.0
"""Logits before an own position flips at which it starts to count in full (half before), and beyond which no more."""
STEPS = 200
LEAST_LOG_ODDS = -6.0


@dataclass(frozen=True)
class CandidateSums:
    """Fall of the log-odds when each candidate is ablated, to first order, at the concept's positions and at others."""

    own: Float[Tensor, "position candidate"]
    own_log_odds: Float[Tensor, " position"]
    others: Float[Tensor, "other candidate"]
    other_log_odds: Float[Tensor, " other"]
    elsewhere: Float[Tensor, " candidate"]
    """RMS of the score `effect` at the other positions."""


def choose(effects: CandidateSums, count: int) -> Float[Tensor, " count"]:
    """Return the indices of the `count` chosen candidates, the highest weight first. Deterministic.

    Takes STEPS products with the matrix of others: about one second for a thousand positions.
    """
    candidates = effects.own.shape[1]
    count = min(count, candidates)
    margin = effects.other_log_odds.clamp(LEAST_LOG_ODDS, ROBUST)
    own_margin = effects.own_log_odds.clamp(LEAST_LOG_ODDS, ENOUGH)
    # The middle of the feasible set: weights between 0 and 1 that add up to `count`.
    weights = torch.full((candidates,), count / candidates)
    for step in range(STEPS):
        left = margin - effects.others @ weights
        # Derivative of the other nouns' log-probability; a noun that rises costs less than one that falls.
        slope = torch.sigmoid(-left) * torch.where(left < margin, 1.0, -HELP)
        beyond = effects.own @ weights - own_margin
        # An own position that has flipped by far needs no more neurons.
        pull = torch.sigmoid(HEAD_START + beyond).clamp(min=0.5) * (beyond < ENOUGH)
        gradient = effects.own.T @ pull / len(pull) - UNCERTAINTY * effects.elsewhere
        if len(left):
            gradient = gradient - HARM * (effects.others.T @ slope) / len(left)
        # Frank-Wolfe: a step towards the set that is best for the linearised objective.
        corner = torch.zeros(candidates)
        corner[gradient.topk(count).indices] = 1.0
        # The usual step 2 / (t + 2) from t = 1, which needs no line search; weights stay a mean of sets of `count`.
        weights += 2.0 / (step + 3) * (corner - weights)
    return weights.topk(count).indices


def expected(effects: CandidateSums, chosen: Sequence[int]) -> tuple[float, float]:
    """Return how much ablating the set lowers its own noun and other nouns, in nats, to first order."""
    falls = []
    for part, log_odds in ((effects.own, effects.own_log_odds), (effects.others, effects.other_log_odds)):
        after = log_odds - part[:, list(chosen)].sum(dim=1)
        falls.append(float((logsigmoid(log_odds) - logsigmoid(after)).mean()) if len(part) else 0.0)
    return falls[0], falls[1]
