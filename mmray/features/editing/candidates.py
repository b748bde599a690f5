"""The tokens that learning looks at: those likeliest before the edit, and those of the answers.

Going through the whole vocabulary at every position and step would cost most of an edit. Other tokens count with the
mass that they have before the edit; whether one of them overtakes is checked when an edit is validated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mmray.features.editing.resumed_forward import ResumedForward
from mmray.models.loading import LoadedModel
from mmray.models.norms import unembedded, vocabulary_logits
from mmray.models.parts import unembedding_rows

PER_POSITION = 16
"""Likeliest tokens of each kept position that are candidates."""
CHUNK = 1024
"""Positions whose logits over the vocabulary are held at once."""


@dataclass(frozen=True)
class Candidates:
    """A part of the vocabulary, shared by all positions."""

    model: LoadedModel
    tokens: Int[Tensor, " candidate"]
    number: Int[Tensor, " vocabulary"]
    """The candidate that a token is; −1: none."""
    rows: Float[Tensor, "candidate hidden"]
    """Their unembeddings."""
    bias: Float[Tensor, " candidate"] | None

    def numbers(self, tokens: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
        """Return the candidates that these tokens are; −1 stays −1."""
        numbers = self.number[tokens.clamp(min=0).to(self.number.device)].to(tokens.device)
        return torch.where(tokens >= 0, numbers, tokens)

    def logits(self, states: Float[Tensor, "position hidden"]) -> Float[Tensor, "position candidate"]:
        """Return the candidates' logits in fp32, from the input of the final norm at each position."""
        normed = unembedded(self.model, states).to(self.rows.device)
        found = functional.linear(normed.float(), self.rows, self.bias)
        cap = self.model.parts.logit_cap
        return (found if cap is None else cap * torch.tanh(found / cap)).to(states.device)


@torch.no_grad()
def candidates(
    model: LoadedModel, kept: Iterable[ResumedForward], words: Iterable[int]
) -> tuple[Candidates, list[Float[Tensor, " position"]]]:
    """Return the likeliest tokens at the kept positions before the edit, with `words`.

    Also returns, per part, log Σ exp(logit) over the whole vocabulary at each position.
    """
    table = unembedding_rows(model.network, model.parts)
    chosen = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    chosen[list(words)] = True
    totals = []
    for part in kept:
        found = []
        for states in torch.split(part.states(None), CHUNK):
            logits = vocabulary_logits(model, states)
            chosen[logits.topk(min(PER_POSITION, logits.shape[1]), dim=1).indices.flatten()] = True
            found.append(logits.logsumexp(dim=1))
        totals.append(torch.cat(found).to(part.hidden.device))
    tokens = chosen.nonzero()[:, 0]
    number = torch.full((len(table),), -1, device=table.device)
    number[tokens] = torch.arange(len(tokens), device=table.device)
    bias = getattr(model.network.get_submodule(model.parts.unembedding), "bias", None)
    bias = None if bias is None else bias.detach()[tokens].float()
    return Candidates(model, tokens, number, table[tokens].detach().float(), bias), totals


def log_rest(
    total: Float[Tensor, " position"], logits: Float[Tensor, "position candidate"]
) -> Float[Tensor, " position"]:
    """Return log Σ exp(logit) over all tokens but the candidates, given that over all tokens, and the candidates'."""
    share = (logits.logsumexp(dim=1) - total).exp()
    # Clamped: rounding can make the candidates' share 1 or more, where they are all that counts.
    return total + torch.log1p(-share.clamp(max=1 - 1e-6))
