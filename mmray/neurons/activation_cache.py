"""Activations of one forward at chosen positions; every score without a gradient is computed from them."""

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
from mmray.models.streams import StreamMix
from mmray.neurons.statistics import TokenStatistics
from mmray.neurons.token_positions import TokenPosition, flat_positions


@dataclass
class ActivationCache:
    """What one forward computed at the positions, by layer."""

    positions: Sequence[TokenPosition]
    activations: dict[int, Float[Tensor, "position neuron"]] = field(default_factory=dict)
    gate: dict[int, Float[Tensor, "position neuron"]] = field(default_factory=dict)
    """The gate before its non-linearity; in a plain MLP the activation."""
    mlp_out: dict[int, Float[Tensor, "position hidden"]] = field(default_factory=dict)
    """Output of the projections that a norm follows."""
    mix: StreamMix | None = None
    """How the decoder's streams are mixed, if there are several."""
    hidden: Float[Tensor, "position hidden"] = field(default_factory=lambda: torch.zeros(0, 0))
    """Input of the final norm; part of the autograd graph if the forward builds one."""

    @property
    def tokens(self) -> Int[Tensor, " position"]:
        """The token that each position predicts."""
        return torch.tensor([occurrence.token for occurrence in self.positions], dtype=torch.long)

    def at(self, numbers: Sequence[int]) -> ActivationCache:
        """Return what is at some of the positions."""
        index = torch.tensor(numbers, dtype=torch.long)

        def chosen(layers: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: values[index.to(values.device)] for layer, values in layers.items()}

        return ActivationCache(
            [self.positions[number] for number in numbers],
            chosen(self.activations),
            chosen(self.gate),
            chosen(self.mlp_out),
            None if self.mix is None else self.mix.at(index),
            self.hidden[index.to(self.hidden.device)],
        )


@contextmanager
def cache_activations(
    model: LoadedModel,
    batch: Batch,
    positions: Sequence[TokenPosition],
    statistics: TokenStatistics | None = None,
    *,
    gates: bool = True,
) -> Iterator[ActivationCache]:
    """Keep what the forward inside the `with` block computes at these positions; complete after the block.

    `statistics` also gets every layer, and must have been given the batch before (`begin`). Without `gates`, which take
    as much memory as the activations, `gate` stays empty.
    """
    rows = flat_positions(batch, positions)
    cache = ActivationCache(positions)

    def receive(layer: int, activation: Tensor, gate: Tensor) -> None:
        activation, gate = activation.detach(), gate.detach()
        # Only the chosen positions are kept: all of them would not fit a GPU's memory.
        index = rows.to(activation.device)
        cache.activations[layer] = activation[index].float()
        if gates:
            # Not in fp32 yet: the gate's activation function is still to be applied in the network's number format.
            cache.gate[layer] = gate[index]
        if statistics is not None:
            statistics.add(layer, activation, gate)

    def receive_final(states: Tensor) -> None:
        cache.hidden = states.flatten(0, -2)[rows.to(states.device)]

    def receive_mlp_out(layer: int, output: Tensor) -> None:
        cache.mlp_out[layer] = output.detach().flatten(0, -2)[rows.to(output.device)]

    with ExitStack() as stack:
        stack.enter_context(capture_activations(model.network, model.projections, receive))
        stack.enter_context(capture_input(model.norm, receive_final))
        if model.streams is not None:
            cache.mix = stack.enter_context(model.streams.recorded(rows))
        for layer, projection in enumerate(model.projections):
            if projection.post_norm is not None:
                norm = model.network.get_submodule(projection.post_norm)
                stack.enter_context(capture_input(norm, partial(receive_mlp_out, layer)))
        yield cache
    # Without an image Mllama skips its cross-attention blocks: their neurons are zero.
    for layer in sorted(set(range(len(model.widths))) - set(cache.activations)):
        zeros = cache.hidden.new_zeros(batch.rows * batch.positions, model.widths[layer])
        receive(layer, zeros, zeros)


def forward(model: LoadedModel, batch: Batch) -> Any:
    """Run the network on a batch with the KV cache off and logits for the last position only, to save memory."""
    extra: dict[str, Any] = {}
    # transformers' networks differ in which of these they accept.
    parameters = inspect.signature(model.network.forward).parameters
    if "logits_to_keep" in parameters:
        extra["logits_to_keep"] = 1
    # Many networks don't name `use_cache`, but pass unknown arguments on to their decoder.
    if "use_cache" in parameters or any(named.kind is named.VAR_KEYWORD for named in parameters.values()):
        extra["use_cache"] = False
    return model.network(**batch.to(model.device, model.network.dtype), **extra)
