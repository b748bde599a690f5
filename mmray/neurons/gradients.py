"""Gradient × activation: the baseline that needs a backward pass a noun (Schwettmann et al. 2023, "Mmns")."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.errors import InputError
from mmray.models.capture import tap, tap_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import token_logits
from mmray.models.prompting import Batch
from mmray.neurons.places import Place, rank_in_row
from mmray.neurons.statistics import TokenStatistics


def gradient_pass(
    model: LoadedModel,
    batch: Batch,
    places: Sequence[Place],
    *,
    last: bool,
    statistics: TokenStatistics | None = None,
) -> tuple[list[Float[Tensor, "place neuron"]], list[Float[Tensor, "place neuron"]], Float[Tensor, "place hidden"]]:
    """Return, a list entry a layer, gradient × activation and the activation at each place; and the final norm's input.

    The gradient is that of the token's logit with respect to each activation, through all later layers. It is summed
    over the image's positions, as published, or taken at the predicting position alone (`last`). Samples of a batch
    don't depend on one another, so that one backward pass serves the first noun of each, another the second, …
    """
    if any(projection.experts for projection in model.projections):
        raise InputError(f"{model.name}: gradient scores need a Linear's input, which fused experts have not")
    activations: list[Tensor] = []
    hidden: list[Tensor] = []

    def receive(activation: Tensor) -> None:
        # Weights are frozen: the first layer's activations start the graph, and the later ones hang on it.
        activations.append(activation if activation.requires_grad else activation.requires_grad_())

    def count(layer: int, activation: Tensor, opened: Tensor) -> None:
        if statistics is not None:
            statistics.add(layer, activation.detach(), opened.detach())

    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as taps:
        taps.enter_context(tap(model.network, model.projections, count))
        for projection in model.projections:
            taps.enter_context(tap_input(model.network.get_submodule(projection.path), receive))
        taps.enter_context(tap_input(model.norm, hidden.append))
        model.network(**batch.to(model.device, model.network.dtype))
        states = hidden[-1].flatten(0, -2)
        index = torch.tensor([place.row * batch.positions + place.position for place in places], dtype=torch.long)
        tokens = torch.tensor([place.token for place in places], dtype=torch.long)
        logits = token_logits(model, states[index.to(states.device)], tokens)
        scores = [torch.zeros(len(places), width, device=states.device) for width in model.widths]
        turns = rank_in_row(places)
        for turn in sorted(set(turns)):
            members = [place for place, own in enumerate(turns) if own == turn]
            gradients = torch.autograd.grad(logits[members].sum(), activations, retain_graph=turn < max(turns))
            for layer, (gradient, activation) in enumerate(zip(gradients, activations, strict=True)):
                for member in members:
                    rows = _rows(batch, places[member], last=last)
                    product = (gradient.flatten(0, -2)[rows].float() * flat(activation)[rows].float()).sum(dim=0)
                    scores[layer][member] = product.to(states.device)
    at_places = [flat(activation)[index.to(activation.device)].float() for activation in activations]
    return scores, at_places, states.detach()[index.to(states.device)]


def flat(activation: Tensor) -> Float[Tensor, "row neuron"]:
    """Return activations with a row a token, out of the graph."""
    return activation.detach().flatten(0, -2)


def _rows(batch: Batch, place: Place, *, last: bool) -> Tensor:
    first = place.row * batch.positions
    if last:
        return torch.tensor([first + place.position])
    spans = [range(run.start, run.stop) for run in batch.runs if run.row == place.row and run.modality == "image"]
    return torch.tensor([first + position for span in spans for position in span], dtype=torch.long)
