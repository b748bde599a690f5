"""MaxBoxAcc by the protocol of weakly supervised object localisation (Choe et al. 2020), as its released code has it.

The map is scaled to 0..255 at 224 × 224 pixels, in whole numbers. At each threshold, the part with the largest contour
area above it gives a box. The box finds an object from an IoU of one half on. One threshold, the best, serves all
images. The released thresholds, in steps of 0.001 of the maximum, are LEVELS different ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from mmray.features.saliency.maps import Saliency, paint
from mmray.features.saliency.measures import Boxes
from mmray.neurons.heatmaps import min_max, upsample

LENGTH = 224
"""Pixels per side of the maps and the images that boxes are compared in."""
LEVELS = 255
"""Thresholds: a point is above the k-th if its level is higher than k, from 0."""
OVERLAP = 0.5
"""IoU from which a box counts as found."""


def boxes_found(saliency: Saliency, boxes: Boxes, covers: Sequence[float]) -> Bool[ndarray, " threshold"]:
    """Return for each of LEVELS thresholds whether the box of the map finds any of an object's boxes.

    Boxes are x, y, width, height as fractions of the image, of which the map shows `covers`.
    """
    left, top, width, height = covers
    shown = np.array([((x - left) / width, (y - top) / height, w / width, h / height) for x, y, w, h in boxes])
    # Clamped, because what a crop has cut off an object can't be found on the map.
    true = np.concatenate([shown[:, :2], shown[:, :2] + shown[:, 2:]], axis=1).clip(0, 1)
    # Cut to whole pixels, not rounded, as the released code does.
    ious = inclusive_iou(threshold_boxes(levels_of(saliency)), (true * LENGTH).astype(int))
    return np.asarray((ious >= OVERLAP).any(axis=1))


def levels_of(saliency: Saliency) -> Int[ndarray, "row column"]:
    """Return a map at LENGTH × LENGTH pixels, from its lowest value as 0 to its highest as 255."""
    if saliency.weights is not None and saliency.boxes is not None:
        # Painted anew: an enlarged map of boxes would have soft edges, of values that no box has.
        values = paint(saliency.boxes, saliency.weights, LENGTH)
    else:
        values = upsample(saliency.values, LENGTH, LENGTH)
    found: Int[ndarray, "row column"] = (min_max(values.float().cpu()) * LEVELS).to(torch.uint8).numpy()
    return found


def threshold_boxes(levels: Int[ndarray, "row column"]) -> Int[ndarray, "threshold 4"]:
    """Return left, top, right and bottom of the largest part above each threshold; zeros where nothing is.

    The right and bottom ends lie one pixel outside the part, unless the map ends there, as in the released code.
    """
    height, width = levels.shape
    found = np.zeros((LEVELS, 4), int)
    present = np.unique(levels)
    # Between two levels that the map has, every threshold gives the same parts.
    for low, high in zip(present[:-1].tolist(), present[1:].tolist(), strict=True):
        _, mask = cv2.threshold(levels, low, LEVELS, cv2.THRESH_BINARY)
        # The tree lists holes, too. None encloses more than the part around it, so no hole is ever the largest.
        contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        left, top, across, down = cv2.boundingRect(max(contours, key=cv2.contourArea))
        found[low:high] = left, top, min(left + across, width - 1), min(top + down, height - 1)
    return found


def inclusive_iou(
    boxes: Int[ndarray, "threshold 4"], others: Int[ndarray, "object 4"]
) -> Float[ndarray, "threshold object"]:
    """Return the IoU of boxes whose ends are pixels that belong to them."""
    one, other = boxes[:, None], others[None]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]) + 1
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2] + 1).prod(axis=-1) for box in (one, other)]
    found: Float[ndarray, "threshold object"] = shared / (areas[0] + areas[1] - shared)
    return found
