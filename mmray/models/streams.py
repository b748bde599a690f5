"""Decoders whose blocks pass on several streams, mixed with weights per token: AltUp, in Gemma 3n.

A block predicts each stream from all of them. It runs attention and MLP on one, the active stream, and corrects all
streams by what this changed (Baykal et al. 2023, "Alternating Updates for Efficient Transformers"). With streams s_j,
the active one s_a, and A and c weights that a router computes for each token:

    predicted    p_j = s_j + Σ_k A_kj s_k
    activated    x = (p_a + attention + LAuReL) / √2 + MLP
    corrected    s_j = p_j + c_j (x - p_a), and an embedding of the token is added to all but the first

Before the final norm, every stream but the first goes through a Linear U_j and is brought to the first one's magnitude
by a factor r_j. The norm gets the mean of all. At a position A, c and r are fixed, as the scale of a norm is. Then what
an MLP writes reaches the final norm by a linear map, and shares of all that is written add up to the logit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.models.capture import capture_input
from mmray.models.linear import rows_of

RESIDUAL = 1 / math.sqrt(2)
"""Factor on the predicted active stream, and on all else that the MLP's write is added to."""


@dataclass
class StreamMix:
    """The weights of one forward at chosen positions, by layer, in fp32."""

    active: int
    unembeddings: list[Float[Tensor, "hidden hidden"]]
    """Rows of U_j, of all streams but the first."""
    predicted: dict[int, Float[Tensor, "position stream stream"]] = field(default_factory=dict)
    """A, by the stream that is read and the one that is written."""
    corrected: dict[int, Float[Tensor, "position stream"]] = field(default_factory=dict)
    """c."""
    merged: Float[Tensor, "position stream"] = field(default_factory=lambda: torch.zeros(0, 0))
    """r, divided by the number of streams."""

    def directions(
        self, final: Float[Tensor, "position hidden"]
    ) -> Iterator[tuple[Float[Tensor, "position hidden"], Float[Tensor, "position stream hidden"]]]:
        """Yield, from the last layer to the first, what to multiply with a write to get its share ⟨·, final⟩.

        First what the layer's MLP adds to the active stream, then what is added to each stream after the layer. A write
        passes later layers by the streams alone, not through their attention and MLPs. After the first layer, there is
        one more pair: zeros, and what is added to the streams before this layer.
        """
        final, factors = final.float(), self.merged.to(final.device)[..., None]
        through = [final @ rows.to(final.device).float().T for rows in self.unembeddings]
        streams = torch.stack([final, *through], dim=1) * factors
        for layer in sorted(self.corrected, reverse=True):
            write = (self.corrected[layer].to(final.device)[..., None] * streams).sum(dim=1)
            yield write, streams
            streams = streams.clone()
            streams[:, self.active] += (RESIDUAL - 1) * write
            streams = streams + self.predicted[layer].to(final.device) @ streams
        yield torch.zeros_like(final), streams

    def by_layer(self, final: Float[Tensor, "position hidden"]) -> list[Float[Tensor, "position hidden"]]:
        """Return per layer, first layer first, the direction of what its MLP writes."""
        return [write for write, _ in self.directions(final)][-2::-1]

    def at(self, index: Int[Tensor, " chosen"]) -> StreamMix:
        """Return the weights at some of the positions."""

        def chosen(values: Tensor) -> Tensor:
            return values[index.to(values.device)]

        return replace(
            self,
            predicted={layer: chosen(values) for layer, values in self.predicted.items()},
            corrected={layer: chosen(values) for layer, values in self.corrected.items()},
            merged=chosen(self.merged),
        )


@dataclass
class StreamWrites:
    """All that was written to the streams at chosen positions, by layer, in fp32."""

    active: int
    before: dict[int, Float[Tensor, "position stream hidden"]] = field(default_factory=dict)
    """The streams that entered the block."""
    activated: dict[int, Float[Tensor, "position hidden"]] = field(default_factory=dict)
    """x."""
    other_writes: dict[int, list[Float[Tensor, "position hidden"]]] = field(default_factory=dict)
    """What attention and LAuReL wrote."""
    added: dict[int, Float[Tensor, "position hidden"]] = field(default_factory=dict)
    """What was added to all streams but the first at the block's end."""

    def to_active(self, mix: StreamMix, layer: int) -> Float[Tensor, "position hidden"]:
        """Return what a layer wrote to the active stream: all that x has besides the predicted stream."""
        streams, weights = self.before[layer], mix.predicted[layer][:, :, self.active]
        predicted = streams[:, self.active] + torch.einsum("psh,ps->ph", streams, weights.to(streams))
        return self.activated[layer] - RESIDUAL * predicted

    def of_mlp(self, mix: StreamMix, layer: int) -> Float[Tensor, "position hidden"]:
        """Return the part of it that is neither attention's nor LAuReL's."""
        return self.to_active(mix, layer) - RESIDUAL * torch.stack(self.other_writes[layer]).sum(dim=0)

    def shares(self, mix: StreamMix, directions: Float[Tensor, "direction hidden"]) -> Float[Tensor, " direction"]:
        """Return the sum of all shares of ⟨final norm's input, direction⟩ at the first position."""
        first = mix.at(torch.zeros(len(directions), dtype=torch.long))
        total = torch.zeros(len(directions), device=directions.device)
        layers = sorted(self.activated, reverse=True)
        for layer, (write, after) in zip([*layers, None], first.directions(directions), strict=True):
            if layer is None:
                total += torch.einsum("dsh,sh->d", after, self.before[0][0].to(after))
            else:
                total += write @ self.to_active(mix, layer)[0].to(write)
                total += after[:, 1:].sum(dim=1) @ self.added[layer][0].to(after)
        return total


class Streams:
    """A decoder of several streams."""

    def __init__(self, decoder: Any) -> None:
        self.blocks: Any = decoder.layers
        self.unembeddings: Any = decoder.altup_unembed_projections
        self.active: int = decoder.config.altup_active_idx
        self.count: int = decoder.config.altup_num_inputs

    @contextmanager
    def recorded(self, rows: Int[Tensor, " position"]) -> Iterator[StreamMix]:
        """Keep the weights at these positions, numbered over all rows of the batch, of one forward in the block."""
        mix = StreamMix(self.active, [rows_of(module, torch.float32) for module in self.unembeddings])
        last: list[Tensor] = []

        def chosen(states: Tensor) -> Tensor:
            return states.detach().flatten(0, -2)[rows.to(states.device)].float()

        def keep_prediction(layer: int, _: nn.Module, __: Any, output: Tensor) -> None:
            # The module's outputs are numbered by the written stream first.
            mix.predicted[layer] = chosen(output).reshape(-1, self.count, self.count).mT

        def keep_correction(layer: int, _: nn.Module, __: Any, output: Tensor) -> None:
            mix.corrected[layer] = chosen(output) + 1.0

        def keep_last(_: nn.Module, __: Any, output: Tensor) -> None:
            last[:] = [chosen(stream) for stream in output]

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                stack.enter_context(block.altup.prediction_coefs.register_forward_hook(partial(keep_prediction, layer)))
                stack.enter_context(block.altup.correction_coefs.register_forward_hook(partial(keep_correction, layer)))
            stack.enter_context(self.blocks[-1].register_forward_hook(keep_last))
            yield mix
        mix.merged = _magnitudes(last, mix.unembeddings) / self.count

    @contextmanager
    def writes(self, rows: Int[Tensor, " position"]) -> Iterator[StreamWrites]:
        """Keep all writes at these positions of one forward in the block."""
        kept = StreamWrites(self.active)

        def chosen(states: Tensor) -> Tensor:
            return states.detach().flatten(0, -2)[rows.to(states.device)].float()

        def enter(layer: int, states: Tensor) -> None:
            kept.before[layer] = torch.stack([chosen(stream) for stream in states], dim=1)
            kept.other_writes[layer] = []

        def route(layer: int, states: Tensor) -> None:
            # The router runs for the prediction, and then again on what the block made of it.
            kept.activated[layer] = chosen(states)

        def write(layer: int, _: nn.Module, __: Any, output: Tensor) -> None:
            kept.other_writes[layer].append(chosen(output))

        def add(layer: int, _: nn.Module, __: Any, output: Tensor) -> None:
            kept.added[layer] = chosen(output)

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                stack.enter_context(capture_input(block, partial(enter, layer)))
                stack.enter_context(capture_input(block.altup.router_norm, partial(route, layer)))
                for module in (block.post_attention_layernorm, block.laurel):
                    stack.enter_context(module.register_forward_hook(partial(write, layer)))
                stack.enter_context(block.post_per_layer_input_norm.register_forward_hook(partial(add, layer)))
            yield kept

    def merge(self, states: Float[Tensor, "stream row position hidden"]) -> Float[Tensor, "row position hidden"]:
        """Return what the final norm would get if these were the streams after the last block."""
        first, *others = states.float()
        rows = [rows_of(module, torch.float32) for module in self.unembeddings]
        factors = _magnitudes([first, *others], rows)
        merged = [first, *(other @ weight.to(other) for other, weight in zip(others, rows, strict=True))]
        mean = (torch.stack(merged, dim=-2) * factors[..., None]).mean(dim=-2)
        return mean.to(states.dtype)


SMALLEST = 1e-5
"""Lower bound of a stream's mean square, where magnitudes are made equal."""


def _magnitudes(
    streams: list[Float[Tensor, "... hidden"]], unembeddings: list[Float[Tensor, "hidden hidden"]]
) -> Float[Tensor, "... stream"]:
    """Return the factors r that bring unembedded streams to the magnitude of the first one."""
    first, *others = (stream.float() for stream in streams)
    target = first.square().mean(dim=-1).sqrt()
    squares = [(other @ rows.to(other)).square().mean(dim=-1) for other, rows in zip(others, unembeddings, strict=True)]
    return torch.stack([torch.ones_like(target), *(target / one.clamp(min=SMALLEST).sqrt() for one in squares)], dim=-1)


def by_token(states: Float[Tensor, "... row position hidden"]) -> Float[Tensor, "row position state"]:
    """Return what enters a block, with all streams of a token in one vector."""
    return states.permute(1, 2, 0, 3).flatten(2) if states.dim() == 4 else states


def in_streams(
    states: Float[Tensor, "row position state"], like: Float[Tensor, "... row position hidden"]
) -> Float[Tensor, "... row position hidden"]:
    """Return vectors of `by_token` in the form of what enters the block."""
    if like.dim() != 4:
        return states
    return states.reshape(*states.shape[:2], len(like), -1).permute(2, 0, 1, 3).contiguous()
