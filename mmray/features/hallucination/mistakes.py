"""What a wrong claim mistook for its object: the annotated object under the detector's box, and a picture of both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeAlias

import torch
from PIL import ImageDraw
from PIL.Image import Image, Resampling
from torchvision.ops import box_iou

from mmray.detector.boxes import corners

Box: TypeAlias = Sequence[float]
"""x, y, width and height as fractions of the image."""
MIN_IOU = 0.1
"""Below this IoU no object counts as being under a box."""
SIDE = 240
"""Pixels of a picture's longer side."""
CLAIMED, THERE = (214, 39, 40), (31, 119, 180)
"""Colours of the claimed object's box (red) and of the object that is there (blue)."""


def object_under(box: Box, objects: Sequence[tuple[str, Box]]) -> tuple[str | None, list[float] | None]:
    """Return the object whose box has the highest IoU with this one, and its box; None below MIN_IOU."""
    if not objects:
        return None, None
    ious = box_iou(corners(torch.tensor([list(box)])), corners(torch.tensor([list(other) for _, other in objects])))[0]
    best = int(ious.argmax())
    return (objects[best][0], list(objects[best][1])) if float(ious[best]) >= MIN_IOU else (None, None)


def picture(image: Image, claimed: Box, there: Box | None) -> bytes:
    """Return a PNG of the image with the boxes of the claimed object and of the one that is there."""
    scale = SIDE / max(image.size)
    # Very long images would shrink to a height of 0.
    drawn = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Resampling.BICUBIC)
    pen = ImageDraw.Draw(drawn)
    # The claimed box last, so that it stays visible where both coincide.
    for box, colour in ((there, THERE), (claimed, CLAIMED)):
        if box is not None:
            left, top = box[0] * drawn.width, box[1] * drawn.height
            right, bottom = left + max(box[2], 0) * drawn.width, top + max(box[3], 0) * drawn.height
            # Pillow refuses a rectangle that ends before it begins, which rounding can make of a thin box.
            pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=3)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()
