"""Where in an image neurons are active: heat maps over its patches, their masks, and how well they match a box.

As in Pan et al. (2024), a map is a neuron's activation at each image token, or the mean of several neurons. It is
upsampled bilinearly to the image's size, and its mask is what lies above the 95th percentile. Upsampling interpolates
between patch centres; the released code is half a patch off. That code has used two activations: the gate after its
non-linearity (first and now), and the input of the output projection (in between). Both can be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from mmray.models.capture import capture_activations, gate_function
from mmray.models.loading import LoadedModel
from mmray.models.patches import Patches
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward

PERCENTILE = 0.95
"""Fraction of pixels below the mask's threshold (Pan et al. 2024)."""
SIDE = 96
"""Side in pixels of the square at which maps and boxes are compared."""
STRENGTH = 0.5
"""Weight of the map's colours in an overlay."""

Neurons = Sequence[tuple[int, int]]
Map = Float[Tensor, "row column"]


@dataclass(frozen=True)
class MapRequest:
    """Request for the mean map of some neurons over the image patches of one row of a batch."""

    row: int
    patches: Patches
    neurons: Neurons
    signs: Sequence[float] | None = None
    """-1 flips neurons that write by negative activation; otherwise they would cancel the others."""
    of: Literal["activation", "gate"] = "activation"
    """`gate` is what the released code draws, without signs."""


@torch.inference_mode()
def patch_maps(
    model: LoadedModel, batch: Batch, requests: Sequence[MapRequest], run: Callable[[], object] | None = None
) -> list[Map]:
    """Run the batch once; return for each request the neurons' mean activation (or gate) over the patches.

    `run` replaces the plain forward, for example with changed inputs. Raises InputError if gates can't be read.
    """
    sums = [torch.zeros(len(request.patches.positions)) for request in requests]
    gate_functions = {
        layer: gate_function(model.network, model.projections[layer])
        for layer in {layer for request in requests if request.of == "gate" for layer, _ in request.neurons}
    }

    def receive(layer: int, activation: Tensor, gate: Tensor) -> None:
        for request, total in zip(requests, sums, strict=True):
            chosen = [number for number, (own, _) in enumerate(request.neurons) if own == layer]
            if chosen:
                rows = torch.tensor(request.patches.positions) + request.row * batch.positions
                units = torch.tensor([request.neurons[number][1] for number in chosen])
                signs = torch.tensor([request.signs[number] if request.signs else 1.0 for number in chosen])
                # The gate comes without its non-linearity, which is applied to the chosen neurons alone.
                values = gate if request.of == "gate" else activation
                part = values[rows.to(values.device)][:, units.to(values.device)]
                part = gate_functions[layer](part) if request.of == "gate" else part
                # Summed on the CPU: layers may be on several devices.
                total += part.float().cpu() @ signs.float()

    with capture_activations(model.network, model.projections, receive):
        forward(model, batch) if run is None else run()
    return [
        total.reshape(request.patches.rows, request.patches.columns) / max(len(request.neurons), 1)
        for request, total in zip(requests, sums, strict=True)
    ]


def upsample(values: Map, height: int, width: int) -> Float[Tensor, "height width"]:
    """Return the map at the image's size, interpolated bilinearly between patch centres."""
    larger = functional.interpolate(values[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return larger[0, 0]


def placed(
    values: Map, covers: tuple[float, float, float, float], height: int, width: int
) -> Float[Tensor, "height width"]:
    """Return the map at its place in an image of this size; uncovered pixels get its lowest value.

    Parts beyond the image, which was padded to a square, are cut off.
    """
    left, top = round(covers[0] * width), round(covers[1] * height)
    wide, tall = round(covers[2] * width), round(covers[3] * height)
    # Not zero, which would stand out in a map of negative values.
    whole = torch.full((height, width), float(values.min()))
    part = upsample(values, tall, wide)[: height - top, : width - left]
    whole[top : top + tall, left : left + wide] = part
    return whole


def min_max(values: Map) -> Map:
    """Return the map scaled to 0..1; a flat map becomes 0. The maximum is 1 even if nothing is active."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def mask(values: Map) -> Bool[Tensor, "row column"]:
    """Return which pixels lie above the map's 95th percentile."""
    return values > torch.quantile(values.float(), PERCENTILE)


def overlay(image: UInt8[Tensor, "height width 3"], values: Map) -> UInt8[Tensor, "height width 3"]:
    """Return the image blended with the map's colours, from blue (lowest) to red (highest)."""
    heat = min_max(upsample(values, *image.shape[:2]))[..., None]
    ramp = torch.cat([heat, 1 - (2 * heat - 1).abs(), 1 - heat], dim=2) * 255
    return ((1 - STRENGTH) * image.float() + STRENGTH * ramp).round().to(torch.uint8)


@dataclass(frozen=True)
class Pointing:
    """How well a map matches an object's box."""

    hit: bool
    """Whether the map's maximum lies in the box (the pointing game)."""
    iou: float
    """IoU of the map's mask with the box."""
    area: float
    """Fraction of the map inside the box: the chance that a random point hits."""


def pointing(values: Map, box: Sequence[float], covers: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> Pointing:
    """Compare a map with a box (x, y, width, height); box and `covers`, the map's extent, are in 0..1 of the image."""
    # At a fixed size: a coarse grid would quantise the IoU.
    larger = upsample(values, SIDE, SIDE)
    within = inside(box, covers)
    above = mask(larger)
    union = int((above | within).sum())
    highest = divmod(int(larger.argmax()), SIDE)
    return Pointing(
        bool(within[highest]), int((above & within).sum()) / union if union else 0.0, float(within.float().mean())
    )


def inside(box: Sequence[float], covers: Sequence[float]) -> Bool[Tensor, "row column"]:
    """Return which pixels of a SIDE × SIDE map have their centre in the box."""
    centres = (torch.arange(SIDE) + 0.5) / SIDE
    across, down = covers[0] + centres * covers[2], covers[1] + centres * covers[3]
    wide = (across >= box[0]) & (across < box[0] + box[2])
    tall = (down >= box[1]) & (down < box[1] + box[3])
    return tall[:, None] & wide[None, :]
