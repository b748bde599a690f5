"""Shapes of an edit: directions in which it changes what it should, and kept answers little.

An edit Δ changes the MLP output by Δᵀa, where a are the activations of its neurons. At kept positions it costs about

    KL(before ‖ after) ≈ ½ tr(Δᵀ C Δ F)        C = E[aaᵀ], F = E[ggᵀ], g = ∇ log p(y), y drawn from the model

with C and F taken as independent (K-FAC, Martens and Grosse 2015). C says which activations kept answers have, F which
changes of the residual stream their probabilities feel. So Δ is learned as SMR, with M the parameters:

    whitened      S = (C + λI)^(-1/2), R = (F + μI)^(-1/2): then the cost is ½‖M‖², with the ridges λ and μ. S alone is
                  the C⁻¹ of ROME (Meng et al. 2022)
    null space    S projects on the eigenvectors of C with the smallest eigenvalues, R = I (AlphaEdit, Fang et al. 2025)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import resume_all
from mmray.models.linear import sizes
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits

INPUT_RIDGE, OUTPUT_RIDGE = 0.05, 1.0
"""λ and μ, in units of the mean eigenvalue of C and F."""
LARGEST_SHARE = 1e-2
"""Of tr C: that of the null space's directions together."""
POSITIONS, DRAWS, CHUNK = 1024, 2, 256
"""Positions per kind of kept answers that F is estimated at, tokens drawn at each, and positions held at once."""


def whitening(moment: Float[Tensor, "row row"], ridge: float) -> Float[Tensor, "row row"]:
    """Return (moment + ridge · its mean eigenvalue · I)^(-1/2)."""
    values, vectors = torch.linalg.eigh(moment.double())
    # Rounding can make the smallest eigenvalues negative.
    floor = ridge * values.mean().clamp(min=torch.finfo(torch.float32).tiny)
    root: Tensor = (vectors * (values.clamp(min=0) + floor).rsqrt()) @ vectors.T
    return root.float()


def null_space(moment: Float[Tensor, "row row"], share: float = LARGEST_SHARE) -> Float[Tensor, "row row"]:
    """Return the projector on the eigenvectors of the smallest eigenvalues, which sum to at most `share` of all."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    # At least one direction, or nothing could be learned.
    count = max(1, int((values.cumsum(0) <= share * values.sum()).sum()))
    projector: Tensor = vectors[:, :count] @ vectors[:, :count].T
    return projector.float()


@dataclass(frozen=True)
class Curvature:
    """What changes cost the kept answers of a model, by kind and with each kind's weight."""

    model: LoadedModel
    kept: Mapping[str, Sequence[Example]]
    weights: Mapping[str, float]
    seed: int
    shapes: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer and units."""

    def shape(self, deltas: Deltas, layer: int) -> tuple[Float[Tensor, "unit unit"], Float[Tensor, "hidden hidden"]]:
        """Return S and R of a whitened layer, computed once for the same neurons."""
        units = deltas.units[layer]
        key = (layer, *units.tolist())
        if key not in self.shapes:
            left = whitening(self.second_moment(deltas, layer), INPUT_RIDGE)
            self.shapes[key] = left, whitening(self.fisher, OUTPUT_RIDGE).to(units.device)
        return self.shapes[key]

    @torch.no_grad()
    def second_moment(self, deltas: Deltas, layer: int) -> Float[Tensor, "unit unit"]:
        """Return C of a layer's edited neurons: the mean over each kind's tokens, and the weighted mean of kinds."""
        units = deltas.units[layer]
        # Nothing is learned with these: they only say whose activations a resumed forward keeps.
        here = Deltas(self.model, [(layer, unit) for unit in units.tolist()])
        moments = {}
        for kind, examples in self.kept.items():
            activation = [part.activation.flatten(0, -2) for part, _ in resume_all(self.model, examples, here)]
            if activation:
                joined = torch.cat(activation)
                moments[kind] = joined.T @ joined / len(joined)
        return _mean(moments, self.weights, len(units)).to(units.device)

    @cached_property
    def fisher(self) -> Float[Tensor, "hidden hidden"]:
        """F at the input of the final norm, estimated at some positions of each kind; the same for all neurons."""
        model, generator = self.model, torch.Generator().manual_seed(self.seed)
        last = Deltas(model, [(len(model.widths) - 1, 0)])
        moments = {}
        for kind, examples in self.kept.items():
            states = [part.states(None) for part, _ in resume_all(model, examples, last)]
            if states:
                joined = torch.cat(states)
                drawn = torch.randperm(len(joined), generator=generator)[:POSITIONS].to(joined.device)
                gradients = torch.cat([_scores(model, chunk, generator) for chunk in torch.split(joined[drawn], CHUNK)])
                moments[kind] = gradients.T @ gradients / len(gradients)
        return _mean(moments, self.weights, sizes(model.network.get_submodule(model.parts.unembedding))[0])


def _scores(
    model: LoadedModel, states: Float[Tensor, "position hidden"], generator: torch.Generator
) -> Float[Tensor, "draw hidden"]:
    """Return ∇ log p of tokens drawn from the model at each position."""
    states = states.detach().float().requires_grad_()
    log_probs = vocabulary_logits(model, states.to(model.network.dtype)).log_softmax(1)
    drawn = torch.multinomial(log_probs.detach().exp().cpu(), DRAWS, replacement=True, generator=generator)
    found = []
    for tokens in drawn.to(log_probs.device).T:
        # Positions don't mix after the last block, so the gradient of the sum holds that of each.
        total = log_probs.gather(1, tokens[:, None]).sum()
        found.append(torch.autograd.grad(total, states, retain_graph=True)[0])
    return torch.cat(found)


def _mean(moments: Mapping[str, Tensor], weights: Mapping[str, float], size: int) -> Tensor:
    """Return the weighted mean; an identity if there is nothing to average."""
    whole = sum(weights.get(kind, 1.0) for kind in moments)
    if not whole:
        return torch.eye(size)
    return torch.stack([weights.get(kind, 1.0) / whole * moment for kind, moment in moments.items()]).sum(0)
