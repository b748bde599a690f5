"""Attention of the language model over a batch, rolled out over its layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.errors import InputError
from mmray.features.saliency.maps import rollout
from mmray.features.saliency.saliency_input import SaliencyInput


@torch.no_grad()
def attention_rollout(look: SaliencyInput) -> list[Float[Tensor, "query key"]]:
    """Return for each row how much of each position reaches each other one, by attention alone.

    Raises InputError where the family does not tell its attention.
    """
    network = look.model.network
    usual = network.config._attn_implementation
    network.set_attn_implementation("eager")  # the faster ones never have the matrix
    try:
        outputs = look.run(look.seen, output_attentions=True)
    finally:
        network.set_attn_implementation(usual)
    layers = getattr(outputs, "attentions", None)
    if not layers or any(layer is None for layer in layers):
        raise InputError(f"{look.model.name}: the family does not tell its attention; leave rollout out")
    return [rollout([layer[row] for layer in layers]).cpu() for row in range(len(look.batch.tokens))]
