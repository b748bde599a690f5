"""What one forward shows of a batch's places, taken while it runs; every score without a gradient follows from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.models.capture import capture_activations, capture_input
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition


@dataclass
class ActivationCache:
    """What stands at the places, by layer."""

    places: Sequence[TokenPosition]
    rows: Int[Tensor, " place"]
    """The places in the batch with its rows one behind the other."""
    activations: dict[int, Float[Tensor, "place neuron"]] = field(default_factory=dict)
    opened: dict[int, Float[Tensor, "place neuron"]] = field(default_factory=dict)
    """What opens the neurons, before the non-linearity; in a plain MLP the activation."""
    written: dict[int, Float[Tensor, "place hidden"]] = field(default_factory=dict)
    """Output of the projections that have a norm behind them."""
    hidden: Float[Tensor, "place hidden"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Input of the final norm; in the graph, where the forward makes one."""

    @property
    def tokens(self) -> Int[Tensor, " place"]:
        """The token that each place predicts."""
        return torch.tensor([place.token for place in self.places], dtype=torch.long)


@contextmanager
def cache_activations(
    model: LoadedModel, batch: Batch, places: Sequence[TokenPosition], statistics: TokenStatistics | None = None
) -> Iterator[ActivationCache]:
    """Keep what stands at these places while the block runs the batch; it is complete once the block has ended.

    Activations of the chosen positions alone are kept, on the device, as each layer computes them; `statistics` sees
    the layers in passing and must have been told of the batch.
    """
    rows = torch.tensor([place.row * batch.positions + place.position for place in places], dtype=torch.long)
    captured = ActivationCache(places, rows)

    def receive(layer: int, activation: Tensor, opened: Tensor) -> None:
        activation, opened = activation.detach(), opened.detach()
        index = rows.to(activation.device)
        captured.activations[layer], captured.opened[layer] = activation[index].float(), opened[index]
        if statistics is not None:
            statistics.add(layer, activation, opened)

    def receive_final(states: Tensor) -> None:
        captured.hidden = states.flatten(0, -2)[rows.to(states.device)]

    def receive_written(layer: int, output: Tensor) -> None:
        captured.written[layer] = output.detach().flatten(0, -2)[rows.to(output.device)]

    with ExitStack() as stack:
        stack.enter_context(capture_activations(model.network, model.projections, receive))
        stack.enter_context(capture_input(model.norm, receive_final))
        for layer, projection in enumerate(model.projections):
            if projection.post_norm is not None:
                norm = model.network.get_submodule(projection.post_norm)
                stack.enter_context(capture_input(norm, partial(receive_written, layer)))
        yield captured
    # Without an image Mllama leaves its cross-attention blocks out: their neurons do nothing.
    for layer in sorted(set(range(len(model.widths))) - set(captured.activations)):
        nothing = captured.hidden.new_zeros(len(batch.tokens) * batch.positions, model.widths[layer])
        receive(layer, nothing, nothing)


def forward(model: LoadedModel, batch: Batch) -> Any:
    """Run the network on a batch, without the cache, and the logits of positions, that nobody asked for."""
    extra: dict[str, Any] = {}
    parameters = inspect.signature(model.network.forward).parameters
    if "logits_to_keep" in parameters:
        extra["logits_to_keep"] = 1
    # Many a network does not name it, and hands on to its decoder what it does not know.
    if "use_cache" in parameters or any(named.kind is named.VAR_KEYWORD for named in parameters.values()):
        extra["use_cache"] = False
    return model.network(**batch.to(model.device, model.network.dtype), **extra)
