"""How good a saliency map is: whether it points at the object and covers it, and whether the word depends on it.

A box is x, y, width, height as fractions of the image. `covers` is the part of the image that the map shows. Of several
objects with one name, finding any of them counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmray.features.saliency.maps import Raster
from mmray.neurons.heatmaps import PERCENTILE, inside

STEPS = 8
"""Steps in which patches are erased, or put back."""

Boxes = Sequence[Sequence[float]]


def highest(values: Raster) -> tuple[int, int]:
    """Return the row and column of the map's highest point; of several, the one nearest to their mean."""
    # Methods that weigh boxes draw plateaus: the first point of one would be its corner.
    tied = (values == values.max()).nonzero().float()
    nearest = int((tied - tied.mean(dim=0)).square().sum(dim=1).argmin())
    row, column = tied[nearest].int().tolist()
    return row, column


def objects_mask(boxes: Boxes, covers: Sequence[float]) -> Bool[Tensor, "point point"]:
    """Return which points of a map lie in any of the boxes."""
    return torch.stack([inside(box, covers) for box in boxes]).any(dim=0)


def points_at(values: Raster, objects: Bool[Tensor, "point point"]) -> bool:
    """Return whether the highest point lies in an object's box: the pointing game."""
    return bool(objects[highest(values)])


def mask_iou(values: Raster, objects: Bool[Tensor, "point point"]) -> float:
    """Return the IoU of the map above its 95th percentile with the objects' boxes."""
    level = torch.quantile(values.float(), PERCENTILE)
    above = values > level
    # A plateau of more than 5 % of the points has nothing above it: it is the mask itself.
    if not above.any():
        above = values >= level
    return float((above & objects).sum() / (above | objects).sum())


def patch_order(values: Raster, rows: int, columns: int) -> Int[Tensor, " patch"]:
    """Return the patches of a grid from the highest mean on the map to the lowest."""
    means = functional.adaptive_avg_pool2d(values[None, None].float(), (rows, columns)).flatten()
    # Stable: maps of boxes have plateaus, whose patches must always come in the same order.
    return means.argsort(descending=True, stable=True)


def area_under(curve: Float[Tensor, " step"]) -> float:
    """Return the area under a curve of even steps from 0 to 1, by trapezoids."""
    return float((curve[:-1] + curve[1:]).mean() / 2)
