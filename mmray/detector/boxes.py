"""Boxes (x, y, width, height in 0..1) against each other and against a grid of patches."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Boxes = Float[Tensor, "... 4"]


def centres(side: int, device: torch.device | None = None) -> Float[Tensor, "patch 2"]:
    """Return x and y of the patches' centres, row by row, of a grid with so many rows and columns."""
    middle = (torch.arange(side, device=device) + 0.5) / side
    down, across = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([across, down], dim=-1).flatten(0, 1)


def centres_inside(boxes: Float[Tensor, "row box 4"], side: int) -> Bool[Tensor, "row box patch"]:
    """Return which patches of the grid have their centre in each box."""
    offset = centres(side, boxes.device) - boxes[..., None, :2]
    return ((offset >= 0) & (offset < boxes[..., None, 2:])).all(dim=-1)


def iou(first: Boxes, second: Boxes) -> Float[Tensor, ...]:
    """Return intersection over union, box by box."""
    intersection, union, _ = _areas(first, second)
    return intersection / union.clamp(min=1e-9)


def generalised_iou(first: Boxes, second: Boxes) -> Float[Tensor, ...]:
    """Return the IoU minus the part of the smallest box round both that neither takes (Rezatofighi et al. 2019)."""
    intersection, union, around = _areas(first, second)
    return intersection / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


def _areas(first: Boxes, second: Boxes) -> tuple[Tensor, Tensor, Tensor]:
    """Return intersection, union, and the area of the smallest box round both."""
    first_end, second_end = first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:]
    start, end = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first_end, second_end)
    intersection = (end - start).clamp(min=0).prod(dim=-1)
    union = first[..., 2:].prod(dim=-1) + second[..., 2:].prod(dim=-1) - intersection
    around = (torch.maximum(first_end, second_end) - torch.minimum(first[..., :2], second[..., :2])).prod(dim=-1)
    return intersection, union, around
