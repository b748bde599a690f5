"""How good a saliency map is: does it point at the object, cover it, and hold what the word depends on.

A box is x, y, width, height in parts of the image; `covers` says which part of the image the map lies over. Of several
objects of one name, each counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmray.features.saliency.maps import Raster
from mmray.neurons.heatmaps import PERCENTILE, inside, min_max

THRESHOLDS = tuple(number / 20 for number in range(20))
"""Of min-max maps, for MaxBoxAcc: the best one over all images counts."""
OVERLAP = 0.5
"""IoU from which a box counts as found."""
STEPS = 8
"""Parts of the patches that are taken away one after the other, or put back."""

Boxes = Sequence[Sequence[float]]


def highest(values: Raster) -> tuple[int, int]:
    """Return the row and column of the map's highest point; of several, that nearest to their mean.

    The highest box of a map of boxes is a plateau, which as a whole stands for its middle.
    """
    tied = (values == values.max()).nonzero().float()
    nearest = int((tied - tied.mean(dim=0)).square().sum(dim=1).argmin())
    row, column = tied[nearest].int().tolist()
    return row, column


def objects_mask(boxes: Boxes, covers: Sequence[float]) -> Bool[Tensor, "point point"]:
    """Return which points of a map lie in one of the boxes."""
    return torch.stack([inside(box, covers) for box in boxes]).any(dim=0)


def points_at(values: Raster, objects: Bool[Tensor, "point point"]) -> bool:
    """Return whether the highest point lies in an object's box: the pointing game."""
    return bool(objects[highest(values)])


def mask_iou(values: Raster, objects: Bool[Tensor, "point point"]) -> float:
    """Return the IoU of the map above its 95th percentile with the objects' boxes.

    Where more than that share of the points has the highest value, these are the mask.
    """
    level = torch.quantile(values.float(), PERCENTILE)
    above = values > level
    if not above.any():
        above = values >= level
    return float((above & objects).sum() / (above | objects).sum())


def boxes_found(values: Raster, boxes: Boxes, covers: Sequence[float]) -> Bool[Tensor, " threshold"]:
    """Tell for each of THRESHOLDS whether the box round the largest part of the map above it finds an object.

    (Choe et al. 2020: MaxBoxAcc is the share of images found at the best threshold.) The map is looked at with half as
    many points a side; points touch at corners too.
    """
    smaller = functional.avg_pool2d(min_max(values.float())[None, None], 2)[0, 0]
    above = smaller >= torch.tensor(THRESHOLDS)[:, None, None]
    corners = _corners(_largest_part(above)) / len(smaller)
    found = torch.zeros(len(THRESHOLDS), dtype=torch.bool)
    for box in boxes:
        left, top = (box[0] - covers[0]) / covers[2], (box[1] - covers[1]) / covers[3]
        true = torch.tensor([left, top, left + box[2] / covers[2], top + box[3] / covers[3]]).clamp(0, 1)
        found |= _corner_iou(corners, true) >= OVERLAP
    return found


def _largest_part(masks: Bool[Tensor, "threshold point point"]) -> Bool[Tensor, "threshold point point"]:
    """Return the largest connected part of each mask: each point takes the highest number among its neighbours."""
    side = masks.shape[1]
    numbers = torch.arange(1.0, side * side + 1).reshape(1, side, side) * masks
    while True:
        spread = functional.max_pool2d(numbers[:, None], 3, stride=1, padding=1)[:, 0] * masks
        if torch.equal(spread, numbers):
            break
        numbers = spread
    labels = numbers.long().flatten(1)
    sizes = torch.zeros(len(masks), side * side + 1).scatter_add_(1, labels, masks.flatten(1).float())
    return (labels == sizes.argmax(dim=1, keepdim=True)).reshape(masks.shape) & masks


def _corners(parts: Bool[Tensor, "threshold point point"]) -> Float[Tensor, "threshold 4"]:
    """Return left, top, right and bottom of each part, in points."""
    side = parts.shape[1]
    ends = []
    for axis in (1, 2):
        taken = parts.any(dim=axis).int()
        ends.append((taken.argmax(dim=1), side - taken.flip(1).argmax(dim=1)))
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], dim=1).float()


def _corner_iou(found: Float[Tensor, "threshold 4"], true: Float[Tensor, " 4"]) -> Float[Tensor, " threshold"]:
    shared = (torch.minimum(found[:, 2:], true[2:]) - torch.maximum(found[:, :2], true[:2])).clamp(min=0).prod(dim=1)
    total = (found[:, 2:] - found[:, :2]).prod(dim=1) + (true[2:] - true[:2]).prod() - shared
    return shared / total.clamp(min=1e-9)


def patch_order(values: Raster, rows: int, columns: int) -> Int[Tensor, " patch"]:
    """Return a grid's patches from the highest to the lowest, by their mean on the map."""
    means = functional.adaptive_avg_pool2d(values[None, None].float(), (rows, columns)).flatten()
    return means.argsort(descending=True, stable=True)


def area_under(curve: Float[Tensor, " step"]) -> float:
    """Return the area under a curve of even steps over 0 to 1 (trapezoids)."""
    return float((curve[:-1] + curve[1:]).mean() / 2)
