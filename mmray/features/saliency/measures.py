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
from torchvision.ops import box_iou

from mmray.detector.boxes import corners
from mmray.features.saliency.maps import Raster
from mmray.neurons.heatmaps import PERCENTILE, inside, min_max

THRESHOLDS = tuple(number / 20 for number in range(20))
"""Of min-max maps, for MaxBoxAcc. One threshold, the best, serves all images."""
OVERLAP = 0.5
"""IoU from which a box counts as found."""
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


def boxes_found(values: Raster, boxes: Boxes, covers: Sequence[float]) -> Bool[Tensor, " threshold"]:
    """Return for each of THRESHOLDS whether the box around the largest part of the map above it finds an object.

    MaxBoxAcc of Choe et al. (2020) is the share of images found at the best threshold. Points that touch at a corner
    are connected.
    """
    # Half as many points per side: finding connected parts takes as many steps as a part is long.
    smaller = functional.avg_pool2d(min_max(values.float())[None, None], 2)[0, 0]
    above = smaller >= torch.tensor(THRESHOLDS)[:, None, None]
    found = _bounding_boxes(_largest_part(above)) / len(smaller)
    left, top, width, height = covers
    shown = [((x - left) / width, (y - top) / height, w / width, h / height) for x, y, w, h in boxes]
    # Clamped, because what a crop has cut off an object can't be found on the map.
    true = corners(torch.tensor(shown, dtype=torch.float64)).clamp(0, 1).float()
    hits: Tensor = box_iou(found, true) >= OVERLAP
    return hits.any(dim=1)


def _largest_part(masks: Bool[Tensor, "threshold point point"]) -> Bool[Tensor, "threshold point point"]:
    """Return the largest connected part of each mask."""
    side = masks.shape[1]
    # Number the points, and let each take the highest number among its neighbours until a part has one number.
    # In floats, which max_pool2d takes on every device; whole numbers are exact in them up to 2²⁴.
    numbers = torch.arange(1.0, side * side + 1).reshape(1, side, side) * masks
    while True:
        spread = functional.max_pool2d(numbers[:, None], 3, stride=1, padding=1)[:, 0] * masks
        if torch.equal(spread, numbers):
            break
        numbers = spread
    labels = numbers.long().flatten(1)
    sizes = torch.zeros(len(masks), side * side + 1).scatter_add_(1, labels, masks.flatten(1).float())
    # An empty mask has only label 0, which is the background and not a part.
    return (labels == sizes.argmax(dim=1, keepdim=True)).reshape(masks.shape) & masks


def _bounding_boxes(parts: Bool[Tensor, "threshold point point"]) -> Float[Tensor, "threshold 4"]:
    """Return left, top, right and bottom of each part, in points. (`masks_to_boxes` refuses empty parts.)"""
    side = parts.shape[1]
    ends = []
    for axis in (1, 2):
        taken = parts.any(dim=axis).int()
        ends.append((taken.argmax(dim=1), side - taken.flip(1).argmax(dim=1)))
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], dim=1).float()


def patch_order(values: Raster, rows: int, columns: int) -> Int[Tensor, " patch"]:
    """Return the patches of a grid from the highest mean on the map to the lowest."""
    means = functional.adaptive_avg_pool2d(values[None, None].float(), (rows, columns)).flatten()
    # Stable: maps of boxes have plateaus, whose patches must always come in the same order.
    return means.argsort(descending=True, stable=True)


def area_under(curve: Float[Tensor, " step"]) -> float:
    """Return the area under a curve of even steps from 0 to 1, by trapezoids."""
    return float((curve[:-1] + curve[1:]).mean() / 2)
