"""Gradient × activation: the baseline that needs a backward pass a noun (Schwettmann et al. 2023, "Mmns"), and effect.

What is differentiated, and over which positions the products are summed, is all that sets these scores apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.capture import capture_activations
from mmray.models.layout import Projection
from mmray.models.loading import LoadedModel
from mmray.models.norms import token_log_odds, token_logits
from mmray.models.parts import output_rows
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition, rank_in_row


def gradient_pass(
    model: LoadedModel,
    batch: Batch,
    places: Sequence[TokenPosition],
    score: str,
    *,
    statistics: TokenStatistics | None = None,
) -> tuple[list[Float[Tensor, "place neuron"]], ActivationCache]:
    """Return gradient × activation at each place, a list entry a layer, and what else the forward showed.

    `gradient`: of the token's logit, summed over the image's positions, as published; `gradient-last`: at the
    predicting position alone; `effect`: of the token's log-odds, over all positions: the first-order estimate of what
    ablating the neuron takes from them. All gradients run through all later layers. Samples of a batch don't depend on
    one another, so that one backward pass serves the first noun of each, another the second, …

    Raises InputError for `gradient` where a place's sequence holds no image: there the sum would be of nothing.
    """
    if score == "gradient":
        pictured = {run.row for run in batch.runs if run.modality == "image" and model.parts.image_in_sequence}
        if not pictured.issuperset(place.row for place in places):
            raise InputError(
                f"{model.name}: --score gradient sums over the image's positions, and the sequence with the caption "
                "has none; use gradient-last or effect"
            )
    # By layer: without an image Mllama leaves its cross-attention blocks out, and nothing hangs on their neurons.
    ends: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        with cache_activations(model, batch, places, statistics) as captured, ExitStack() as taps:
            taps.enter_context(
                capture_activations(model.network, model.projections, lambda n, seen, _: activations.update({n: seen}))
            )
            for layer, projection in enumerate(model.projections):
                taps.callback(_keep_end(model.network.get_submodule(projection.path), projection, layer, ends).remove)
            forward(model, batch)
        differentiated = token_log_odds if score == "effect" else token_logits
        numbers = differentiated(model, captured.hidden, captured.tokens)
        scores = [
            torch.zeros(len(places), width, device=captured.activations[layer].device)
            for layer, width in enumerate(model.widths)
        ]
        turns = rank_in_row(places)
        for turn in sorted(set(turns)):
            members = [place for place, own in enumerate(turns) if own == turn]
            found = torch.autograd.grad(numbers[members].sum(), list(ends.values()), retain_graph=turn < max(turns))
            for layer, whole in zip(ends, found, strict=True):
                projection, gradient = model.projections[layer], whole.flatten(0, -2)
                for member in members:
                    rows = _rows(batch, places[member], score).to(gradient.device)
                    chosen = gradient[rows].float()
                    if projection.experts:
                        chosen = chosen @ output_rows(model.network, projection).float().T
                    product = (chosen * activations[layer][rows].detach().float()).sum(dim=0)
                    scores[layer][member] = product.to(scores[layer].device)
    captured.hidden = captured.hidden.detach()
    return scores, captured


def _keep_end(module: nn.Module, projection: Projection, layer: int, ends: dict[int, Tensor]) -> Any:
    """Keep, at the next forward, what a layer's gradient is taken with respect to.

    That is the input of its projection, the activations themselves. Fused experts have no such input: there it is their
    output, whose gradient times the rows of W_out is that of the activations.
    """

    def keep(tensor: Tensor) -> None:
        # Weights are frozen: the first layer's activations start the graph, and the later ones hang on it.
        ends[layer] = tensor if tensor.requires_grad else tensor.requires_grad_()

    see_input: Callable[..., None] = lambda _, arguments: keep(arguments[0])  # noqa: E731
    see_output: Callable[..., None] = lambda _, __, output: keep(output)  # noqa: E731
    if projection.experts:
        return module.register_forward_hook(see_output)
    return module.register_forward_pre_hook(see_input)


def _rows(batch: Batch, place: TokenPosition, score: str) -> Tensor:
    """Return the rows of the flattened batch that the products are summed over."""
    first = place.row * batch.positions
    if score == "gradient-last":
        return torch.tensor([first + place.position])
    if score == "effect":
        return torch.arange(first, first + place.position + 1)
    spans = [range(run.start, run.stop) for run in batch.runs if run.row == place.row and run.modality == "image"]
    return torch.tensor([first + position for span in spans for position in span], dtype=torch.long)
