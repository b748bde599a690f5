"""How much a neuron gives to a token: the scores of one forward pass, all with one signature.

Notation: activation a [occurrence, neuron] is the input of the MLP's output projection at the position that predicts
the token. The neuron writes its row w of W_out; u is the token's row of the unembedding W_U. All in fp32.
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
    """One layer's values at the occurrences of a batch, in fp32."""

    activation: Float[Tensor, "occurrence neuron"]
    """Input of the output projection: gate · factor in a gated MLP."""
    gate: Float[Tensor, "occurrence neuron"]
    """The gate after its non-linearity; in a plain MLP the activation."""
    projection: Float[Tensor, "occurrence neuron"]
    """⟨row of W_out, unembedding of the token⟩, with the final norm folded in if requested."""
    seeds: Int[Tensor, " occurrence"]
    """A number that depends only on the occurrence and the layer, not on the batch."""


ScoreFunction = Callable[[Located], Float[Tensor, "occurrence neuron"]]


def contribution(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return activation · projection: the neuron's exact additive share of the token's logit (Pan et al. 2024).

    The share is of the MLP's own output. A norm or factor between it and the residual stream (Gemma 2 and 3; Mllama's
    cross-attention) counts only if the final norm is folded in.
    """
    return located.activation * located.projection


def gate(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return gate · projection, as the authors' released code does: without the factor `up` and the routing weight."""
    return located.gate * located.projection


def activation(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return the activation: the paper's baseline, which ignores the token."""
    return located.activation


def random(located: Located) -> Float[Tensor, "occurrence neuron"]:
    """Return numbers drawn uniformly from 0 to 1: the control that every score has to beat."""
    drawn = torch.zeros(located.activation.shape)
    for row, seed in zip(drawn, located.seeds.tolist(), strict=True):
        # One generator per occurrence: the draw must not depend on what shares the batch.
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return drawn.to(located.activation)


FUNCTIONS: dict[str, ScoreFunction] = {
    "contribution": contribution,
    "gate": gate,
    "activation": activation,
    "random": random,
}
"""By their names in `mmray.neurons.scores.SCORES`."""


def project(
    unembedding: Float[Tensor, "occurrence hidden"], rows: Float[Tensor, "neuron hidden"]
) -> Float[Tensor, "occurrence neuron"]:
    """Return ⟨w, u⟩ for every neuron's row and every occurrence's unembedding, in fp32."""
    # Only these tokens: a table of neurons × vocabulary would take 35 GB for a model of 13 B parameters.
    # Padded, so that the bits don't depend on how many occurrences the batch has.
    return (enough_rows(unembedding.float()) @ rows.float().T)[: len(unembedding)]
