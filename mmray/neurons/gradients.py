"""Gradient × activation, which needs one backward pass per noun (Schwettmann et al. 2023, "Mmns").

The scores differ only in what is differentiated, and over which positions the products are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmray.errors import InputError
from mmray.models.blocks import block_output
from mmray.models.capture import capture_activations, capture_input
from mmray.models.linear import has_quantised
from mmray.models.loading import LoadedModel
from mmray.models.norms import token_log_odds, token_logits
from mmray.models.parts import output_rows
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition, rank_in_row

SHORT = 128
"""Positions up to which, in bf16 on a CPU, attention by plain products takes half the time of the fused kernel's."""


def gradient_pass(
    model: LoadedModel,
    batch: Batch,
    positions: Sequence[TokenPosition],
    score: str,
    *,
    statistics: TokenStatistics | None = None,
) -> tuple[list[Float[Tensor, "position neuron"]], ActivationCache]:
    """Return gradient × activation at each position, one list entry per layer, and the forward's cache.

    `gradient`: of the token's logit, summed over the image's positions, as published; `gradient-last`: the same at the
    predicting position only; `effect`: of the token's log-odds, over all positions, the first-order estimate of what
    ablating the neuron takes from them. Gradients run through all later layers.

    Raises InputError for `gradient` if a row has no image in its sequence: the sum would be empty.
    """
    if score == "gradient":
        with_image = {span.row for span in batch.spans if span.modality == "image" and model.parts.image_in_sequence}
        if not with_image.issuperset(occurrence.row for occurrence in positions):
            raise InputError(
                f"{model.name}: --score gradient sums over the image's positions, and the sequence with the caption "
                "has none; use gradient-last or effect"
            )
    # By layer: without an image Mllama skips its cross-attention blocks, which then have no gradient.
    leaves: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        with cache_activations(model, batch, positions, statistics) as cache, ExitStack() as hooks:
            hooks.enter_context(
                capture_activations(
                    model.network, model.projections, lambda layer, found, _: activations.update({layer: found})
                )
            )
            for layer in range(len(model.widths)):
                hooks.enter_context(_kept_leaf(model, layer, leaves))
            hooks.enter_context(_attention(model, batch.positions))
            forward(model, batch)
        differentiated = token_log_odds if score == "effect" else token_logits
        values = differentiated(model, cache.hidden, cache.tokens)
        scores = [
            torch.zeros(len(positions), width, device=cache.activations[layer].device)
            for layer, width in enumerate(model.widths)
        ]
        # Rows of a batch are independent: one backward pass serves the first noun of every row, another the second, …
        ranks = rank_in_row(positions)
        for rank in sorted(set(ranks)):
            members = [number for number, own in enumerate(ranks) if own == rank]
            last = rank == max(ranks)
            gradients = _gradients(model, values[members].sum(), list(leaves.values()), last=last)
            for layer, whole in zip(leaves, gradients, strict=True):
                projection, gradient = model.projections[layer], whole.flatten(0, -2)
                for member in members:
                    rows = _summed_rows(batch, positions[member], score)
                    # Products in fp32, whatever the network's dtype.
                    chosen = gradient[rows].float()
                    if projection.experts:
                        chosen = chosen @ output_rows(model.network, projection).float().T
                    product = (chosen * activations[layer][rows].detach()).sum(dim=0)
                    scores[layer][member] = product.to(scores[layer].device)
    cache.hidden = cache.hidden.detach()
    return scores, cache


def _attention(model: LoadedModel, positions: int) -> AbstractContextManager[None]:
    """Return a context in which attention is computed so that the backward pass is fast."""
    short = model.device.type == "cpu" and model.network.dtype == torch.bfloat16 and positions <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()


def _gradients(model: LoadedModel, value: Tensor, leaves: Sequence[Tensor], *, last: bool) -> Sequence[Tensor]:
    """Return the gradients of a value; raises InputError for quantised layers whose kernels have no backward pass."""
    try:
        return torch.autograd.grad(value, leaves, retain_graph=not last)
    except RuntimeError as error:
        if not has_quantised(model.network) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"{model.name}: its quantised layers have no backward pass; take a score without one, or --dtype bf16"
        ) from error


def _kept_leaf(model: LoadedModel, layer: int, leaves: dict[int, Tensor]) -> AbstractContextManager[Any]:
    """Keep, at the next forward, the tensor that a layer's gradient is taken with respect to.

    That is the projection's input, the activations. Fused experts have no such input: there it is their output, whose
    gradient times the rows of W_out is the activations' gradient.
    """
    projection = model.projections[layer]
    module = model.network.get_submodule(projection.path)

    def keep(tensor: Tensor) -> None:
        # Weights are frozen: the first layer's activations start the graph, and later ones depend on them.
        leaves[layer] = tensor if tensor.requires_grad else tensor.requires_grad_()

    def keep_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        # Some experts return their router's logits, too.
        keep(block_output(output))

    return module.register_forward_hook(keep_output) if projection.experts else capture_input(module, keep)


def _summed_rows(batch: Batch, occurrence: TokenPosition, score: str) -> slice | list[int]:
    """Return the flattened batch positions that the products are summed over."""
    first = occurrence.row * batch.positions
    here = first + occurrence.position
    if score == "gradient":
        return [first + position for position in batch.image_positions(occurrence.row)]
    # Slices, which need no copy. Under the causal mask, later positions have no influence on this one.
    return slice(first if score == "effect" else here, here + 1)
