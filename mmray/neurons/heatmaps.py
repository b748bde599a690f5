"""Where in an image neurons are active: activations over its patches as a map, the map's mask, and how well it points.

As in Pan et al. (2024) a map is the activation of one neuron, or the mean of several, at each image token, bilinear to
the image's size (between the patches' centres; the released code is half a patch off); the mask is what lies above the
map's 95th percentile. Which number is a neuron's activation has changed in the released code: the gate after its
non-linearity at first and now, the input of the output projection for a while. Both can be drawn.
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
"""Part of the pixels that lie below the mask's threshold (Pan et al. 2024)."""
SIDE = 96
"""Pixels a side at which a map is held against boxes."""
STRENGTH = 0.5
"""Weight of the map's colours over the image."""

Neurons = Sequence[tuple[int, int]]
Map = Float[Tensor, "row column"]


@dataclass(frozen=True)
class MapRequest:
    """The map that is asked for: of these neurons, each with its sign, over the patches of a row of the batch.

    Signs of -1 turn neurons round that write by negative activation: without signs their activations cancel those of
    the others. `gate` instead of the activation is what the released code draws, without signs.
    """

    row: int
    patches: Patches
    neurons: Neurons
    signs: Sequence[float] | None = None
    of: Literal["activation", "gate"] = "activation"


@torch.inference_mode()
def patch_maps(
    model: LoadedModel, batch: Batch, wanted: Sequence[MapRequest], run: Callable[[], object] | None = None
) -> list[Map]:
    """Run the batch once, and return the mean activation (or gate) of the neurons over the patches, a map for each ask.

    `run` runs it where it is not to be run as it is. Raises InputError where gates are asked for and can't be read.
    """
    sums = [torch.zeros(len(ask.patches.positions)) for ask in wanted]

    gates = {
        layer: gate_function(model.network, model.projections[layer])
        for layer in {layer for ask in wanted if ask.of == "gate" for layer, _ in ask.neurons}
    }

    def receive(layer: int, activation: Tensor, opened: Tensor) -> None:
        for ask, total in zip(wanted, sums, strict=True):
            chosen = [place for place, (own, _) in enumerate(ask.neurons) if own == layer]
            if chosen:
                rows = torch.tensor(ask.patches.positions) + ask.row * batch.positions
                units = torch.tensor([ask.neurons[place][1] for place in chosen])
                signs = torch.tensor([ask.signs[place] if ask.signs else 1.0 for place in chosen], dtype=torch.float)
                seen = opened if ask.of == "gate" else activation
                part = seen[rows.to(seen.device)][:, units.to(seen.device)]
                part = gates[layer](part) if ask.of == "gate" else part
                total += part.float().cpu() @ signs

    with capture_activations(model.network, model.projections, receive):
        forward(model, batch) if run is None else run()
    return [
        total.reshape(ask.patches.rows, ask.patches.columns) / max(len(ask.neurons), 1)
        for ask, total in zip(wanted, sums, strict=True)
    ]


def upsample(values: Map, height: int, width: int) -> Float[Tensor, "height width"]:
    """Return the map at the image's size, bilinear between the patches' centres."""
    larger = functional.interpolate(values[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return larger[0, 0]


def placed(
    values: Map, covers: tuple[float, float, float, float], height: int, width: int
) -> Float[Tensor, "height width"]:
    """Return the map where it lies in an image of this size; its lowest value stands where it does not reach.

    What of it lies beyond the image (of one that was filled up to a square) is cut off.
    """
    left, top = round(covers[0] * width), round(covers[1] * height)
    wide, tall = round(covers[2] * width), round(covers[3] * height)
    whole = torch.full((height, width), float(values.min()))
    part = upsample(values, tall, wide)[: height - top, : width - left]
    whole[top : top + tall, left : left + wide] = part
    return whole


def min_max(values: Map) -> Map:
    """Return the map between 0 and 1; all 0 where it is flat. (It has a highest point even where nothing is active.)"""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def signed(values: Map) -> Map:
    """Return the map between -1 and 1, its zero where the activation is zero."""
    largest = values.abs().max()
    return values / largest if largest > 0 else torch.zeros_like(values)


def mask(values: Map) -> Bool[Tensor, "row column"]:
    """Return which points lie above the map's 95th percentile."""
    return values > torch.quantile(values.float(), PERCENTILE)


def overlay(image: UInt8[Tensor, "height width 3"], values: Map) -> UInt8[Tensor, "height width 3"]:
    """Return the image under the map's colours: blue where it is lowest, red where it is highest."""
    heat = min_max(upsample(values, *image.shape[:2]))[..., None]
    ramp = torch.cat([heat, 1 - (2 * heat - 1).abs(), 1 - heat], dim=2) * 255
    return ((1 - STRENGTH) * image.float() + STRENGTH * ramp).round().to(torch.uint8)


@dataclass(frozen=True)
class Pointing:
    """How a map lies to an object's box: whether its highest point is inside, and the IoU of its mask with the box.

    `area` is the part of the map that the box takes: where a point drawn at random would be inside.
    """

    hit: bool
    iou: float
    area: float


def pointing(values: Map, box: Sequence[float], covers: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> Pointing:
    """Hold a map against a box (x, y, width, height) in parts of the image, of which the map covers `covers`."""
    larger = upsample(values, SIDE, SIDE)
    within = inside(box, covers)
    above = mask(larger)
    union = int((above | within).sum())
    highest = divmod(int(larger.argmax()), SIDE)
    return Pointing(
        bool(within[highest]), int((above & within).sum()) / union if union else 0.0, float(within.float().mean())
    )


def inside(box: Sequence[float], covers: Sequence[float]) -> Bool[Tensor, "row column"]:
    """Return which points of the map lie in the box, by their centres."""
    centres = (torch.arange(SIDE) + 0.5) / SIDE
    across, down = covers[0] + centres * covers[2], covers[1] + centres * covers[3]
    wide = (across >= box[0]) & (across < box[0] + box[2])
    tall = (down >= box[1]) & (down < box[1] + box[3])
    return tall[:, None] & wide[None, :]
