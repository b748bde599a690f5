"""Boxes in 0..1 as x, y, width, height: conversions, and which patches of a grid they contain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import box_convert

Boxes = Float[Tensor, "... 4"]


def corners(boxes: Boxes) -> Boxes:
    """Return left, top, right and bottom of boxes: the form that `torchvision.ops` expects."""
    converted: Tensor = box_convert(boxes, "xywh", "xyxy")
    return converted


def from_centres(boxes: Boxes) -> Boxes:
    """Return boxes given by their centre and size as x, y, width, height."""
    # Not box_convert: it goes through corners, which changes the last bits of width and height.
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)


def with_centres(boxes: Boxes) -> Boxes:
    """Return boxes by their centre and size: the inverse of `from_centres`."""
    return torch.cat([boxes[..., :2] + boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)


def in_image(boxes: Boxes, covers: Sequence[float]) -> Boxes:
    """Return boxes of what a tower sees as boxes of the image, of which it sees the part `covers`."""
    left, top, width, height = covers
    return boxes * boxes.new_tensor([width, height, width, height]) + boxes.new_tensor([left, top, 0.0, 0.0])


def centres(side: int, device: torch.device | None = None) -> Float[Tensor, "patch 2"]:
    """Return x and y of the patch centres of a grid of side × side patches, row by row."""
    middle = (torch.arange(side, device=device) + 0.5) / side
    down, across = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([across, down], dim=-1).flatten(0, 1)


def centres_inside(boxes: Float[Tensor, "row box 4"], side: int) -> Bool[Tensor, "row box patch"]:
    """Return which patches of the grid have their centre in each box."""
    offset = centres(side, boxes.device) - boxes[..., None, :2]
    # Half-open: a centre on the border of two adjacent boxes lies in one of them, not in both.
    return ((offset >= 0) & (offset < boxes[..., None, 2:])).all(dim=-1)
