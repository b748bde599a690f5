"""Mirrored and cropped views of a sample's image, so that an edit made on a few images holds for others too."""

from __future__ import annotations

import io
import random
from dataclasses import replace

from PIL import ImageOps
from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.neurons.model import open_image

SMALLEST_SIDE = 0.85
"""A crop keeps at least this share of each side: less may cut off the object that the caption names."""


def views(sample: Sample, seed: int) -> list[Sample]:
    """Return the sample mirrored, and randomly cropped; nothing for a sample without an image.

    Views have identifiers of their own. Their captions and boxes are the sample's, and may not fit them.
    """
    image = open_image(sample.image, sample.background)
    if image is None:
        return []
    # Seeded by the sample, so that its crop doesn't depend on which other samples are used.
    rng = random.Random(f"{sample.sample_id} {seed}")
    return [
        # Own captions are kept by sample id, so a view without one of its own would get the sample's.
        replace(sample, sample_id=f"{sample.sample_id}, view {number} by {seed}", image=_as_png(view))
        for number, view in enumerate((ImageOps.mirror(image), _crop(image, rng)), 1)
    ]


def _crop(image: Image, rng: random.Random) -> Image:
    width, height = (round(side * rng.uniform(SMALLEST_SIDE, 1)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _as_png(image: Image) -> bytes:
    # PNG, because JPEG artefacts would be a second change of the image next to the crop.
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
