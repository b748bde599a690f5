"""What was mistaken for what: the object that stands where the detector would see a claimed one, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeAlias

import torch
from PIL import ImageDraw
from PIL.Image import Image, Resampling

from mmray.detector.boxes import iou

Box: TypeAlias = Sequence[float]
"""x, y, width and height in parts of the image."""
LEAST = 0.1
"""IoU below which nothing stands at a box."""
SIDE = 240
"""Pixels of a picture's longer side."""
CLAIMED, THERE = (214, 39, 40), (31, 119, 180)
"""Colours of the claimed object's box, and of the one that stands there."""


def stands_at(box: Box, objects: Sequence[tuple[str, Box]]) -> tuple[str | None, list[float] | None]:
    """Return the object whose box overlaps most with this one, and its box; None where hardly any does."""
    if not objects:
        return None, None
    shares = iou(torch.tensor(list(box))[None], torch.tensor([list(other) for _, other in objects]))
    place = int(shares.argmax())
    return (objects[place][0], list(objects[place][1])) if float(shares[place]) >= LEAST else (None, None)


def picture(image: Image, claimed: Box, there: Box | None) -> bytes:
    """Return a PNG of the image with the box of what was claimed (red) and of what stands there (blue)."""
    scale = SIDE / max(image.size)
    drawn = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Resampling.BICUBIC)
    pen = ImageDraw.Draw(drawn)
    for box, colour in ((there, THERE), (claimed, CLAIMED)):
        if box is not None:
            left, top = box[0] * drawn.width, box[1] * drawn.height
            right, bottom = left + max(box[2], 0) * drawn.width, top + max(box[3], 0) * drawn.height
            pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=3)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()
