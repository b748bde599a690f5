"""What a neuron gives to a token: every score, one signature, and the table that names them.

Notation: activation a [occurrence, neuron] is the input of the MLP's output projection at the position that predicts
the token; row w of W_out is what the neuron writes; u is the token's row of the unembedding W_U. All in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.models.norms import enough_rows


@dataclass(frozen=True)
class Located:
    """One layer's numbers at the occurrences of a batch; all fp32."""

    activation: Float[Tensor, "occurrence neuron"]
    """Input of the output projection: gate · factor in a gated MLP."""
    gate: Float[Tensor, "occurrence neuron"]
    """The gate after its non-linearity; in a plain MLP the activation."""
    projection: Float[Tensor, "occurrence neuron"]
    """⟨row of W_out, unembedding column of the token⟩; with the final norm folded in, in logits after it."""
    seeds: Int[Tensor, " occurrence"]
    """A number that belongs to the occurrence and the layer, whatever the batch."""


ScoreFunction = Callable[[Located], Float[Tensor, "occurrence neuron"]]


def contribution(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return activation · projection: the neuron's exact additive share of the token's logit (Pan et al. 2024).

    Of the MLP's own output: what stands between it and the residual stream (a norm in Gemma 2 and 3, a weight in
    Mllama's cross-attention) is accounted for where the final norm is folded in, and not otherwise.
    """
    return located.activation * located.projection


def gate(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return gate · projection: what the authors' released code computes, which leaves out the factor `up`.

    Of experts it leaves out the routing weight too.
    """
    return located.gate * located.projection


def activation(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return the activation alone: the paper's baseline, blind to the token."""
    return located.activation


def random(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return numbers drawn uniformly from 0 to 1 by occurrence: the control that every score has to beat."""
    width = located.activation.shape[1]
    drawn = torch.zeros(located.activation.shape)
    for row, seed in enumerate(located.seeds.tolist()):
        drawn[row] = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn.to(located.activation)


FUNCTIONS: dict[str, ScoreFunction] = {
    "contribution": contribution,
    "gate": gate,
    "activation": activation,
    "random": random,
}
"""The scores of one forward pass, by their names in `mmray.neurons.scores`."""


def project(
    unembedding: Float[Tensor, "occurrence hidden"], rows: Float[Tensor, "neuron hidden"]
) -> Float[Tensor, "occurrence neuron"]:
    """Return ⟨w, u⟩ of every neuron's row and every token's unembedding, in fp32.

    Only the tokens at hand are projected; the table of the whole vocabulary (35 GB at 13 B parameters) never exists.
    """
    return (enough_rows(unembedding.float()) @ rows.float().T)[: len(unembedding)]
