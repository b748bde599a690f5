"""Encoded images (JPEG, PNG, …) to pictures."""

from __future__ import annotations

import io

import PIL.Image
from PIL.Image import Image

LARGEST_IMAGE = 178_956_970
"""Pixels above which an image is refused unread: a small file can unfold to gigabytes."""


def decode_image(encoded: bytes) -> Image:
    """Return the picture in RGB; raises ValueError, with the reason, for anything that is none."""
    try:
        image = PIL.Image.open(io.BytesIO(encoded))
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {LARGEST_IMAGE:,}")
        return image.convert("RGB")
    except Exception as error:
        # Pillow's own words for it hold an address in memory, which no two runs share.
        reason = "of no known format" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
        raise ValueError(reason) from error
