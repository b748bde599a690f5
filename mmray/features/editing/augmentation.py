"""A sample seen in other ways: what an edit learns from so few images is to hold for others too."""

from __future__ import annotations

import io
import random
from dataclasses import replace

from PIL import ImageOps
from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.neurons.model import open_image

LEAST = 0.85
"""Part of each side that is left at least when a view is cut out."""


def views(sample: Sample, seed: int) -> list[Sample]:
    """Return the sample mirrored, and cut at random; nothing without an image.

    Views have identifiers of their own; their captions and boxes are the sample's, and may not hold.
    """
    image = open_image(sample.image, sample.background)
    if image is None:
        return []
    draw = random.Random(f"{sample.sample_id} {seed}")
    made = (ImageOps.mirror(image), _cut(image, draw))
    return [
        replace(sample, sample_id=f"{sample.sample_id}, view {number} by {seed}", image=_encoded(view))
        for number, view in enumerate(made, 1)
    ]


def _cut(image: Image, draw: random.Random) -> Image:
    width, height = (round(side * draw.uniform(LEAST, 1)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _encoded(image: Image) -> bytes:
    written = io.BytesIO()
    image.save(written, "png")
    return written.getvalue()
