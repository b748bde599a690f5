"""Decode images (JPEG, PNG, …) to RGB; the package has no other decoder.

Pillow's `convert("RGB")` alone loses content: it drops alpha, clips 16 bits to 8, and ignores orientation. Here

- transparent pixels show a background, white by default;
- the EXIF orientation is applied;
- 16-bit grey, and 32-bit integers within 0..65535, are divided by 257; other integers are scaled from their range;
- floats within 0..1 are multiplied by 255; other floats are scaled from their range;
- CMYK and YCbCr are converted without colour profiles; animations give their first frame.
"""

from __future__ import annotations

import io
import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from numpy import ndarray
from PIL.Image import Image, Transpose

from mmray.data.samples import BACKGROUND
from mmray.engine.clock import phase
from mmray.storage import read_file, too_large

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read. Not all that Pillow knows: it passes EPS to Ghostscript, which runs code in the file."""
LARGEST_FILE = 64 << 20
"""Largest encoded image in bytes; checked before reading where possible."""
LARGEST_IMAGE = 178_956_970
"""Most pixels of an image, checked before decoding: a small file can unpack to gigabytes. Pillow's own limit."""
LARGEST_RATIO = 200
"""Largest ratio of long to short side: processors that scale the short side up would blow up the long one."""
ORIENTATION = 0x0112
"""EXIF tag."""
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation → the transpose that shows the stored pixels upright."""


@phase("decode")
def decode_image(encoded: bytes, background: str = BACKGROUND) -> Image:
    """Return the image in RGB; raises ValueError with the reason if it can't be decoded."""
    try:
        # Sizes are checked before any pixel is decoded.
        if len(encoded) > LARGEST_FILE:
            raise ValueError(too_large(len(encoded), LARGEST_FILE))
        image = PIL.Image.open(io.BytesIO(encoded), formats=image_formats())
        _check_size(*image.size)
        return to_rgb(image, background)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"more than {LARGEST_IMAGE:,} pixels") from error
    except PIL.UnidentifiedImageError as error:
        # Pillow's message holds a memory address, which would differ between runs in the table `errors`.
        raise ValueError("of no known format") from error
    # Pillow raises dozens of types for damaged files; each is a row in `errors`, not a crash.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def image_size(encoded: bytes) -> tuple[int, int]:
    """Return width and height as stored, without decoding; zeros if `decode_image` would refuse the image."""
    try:
        size = PIL.Image.open(io.BytesIO(encoded), formats=image_formats()).size
        _check_size(*size)
    except Exception:  # noqa: BLE001  `decode_image` reports it
        return 0, 0
    return size


def read_image(file: Path | str, background: str = BACKGROUND) -> Image:
    """Return the image in a file in RGB; raises ValueError with the reason if it can't be read."""
    try:
        return decode_image(read_file(Path(file), LARGEST_FILE), background)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def to_rgb(image: Image, background: str = BACKGROUND) -> Image:
    """Return an image of any mode in RGB, by the rules above; raises ValueError for values that are not finite."""
    image.load()  # First of all: a PNG's EXIF data may come after its pixels.
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        rgb = _grey(image, background)
    elif image.has_transparency_data:
        # Pillow can't convert premultiplied grey (La) to RGBA in one step.
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        rgb = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, background), layer).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"{width:,} × {height:,} pixels, more than {LARGEST_IMAGE:,}")
    if max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(f"{width:,} × {height:,} pixels: one side is more than {LARGEST_RATIO} times the other")


@cache
def image_formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow reads."""
    PIL.Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in PIL.Image.OPEN)


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (ValueError, TypeError, KeyError, SyntaxError, OSError, struct.error):
        return 1  # Damaged EXIF data; the pixels are fine.


def _grey(image: Image, background: str) -> Image:
    """Return an image of one deep channel in RGB; its transparent value, if it names one, shows the background."""
    values = np.asarray(image)
    grey = PIL.Image.fromarray(_eight_bits(values)).convert("RGB")
    transparent: Any = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.paste(PIL.Image.new("RGB", grey.size, background), mask=PIL.Image.fromarray(values == transparent))
    return grey


def _eight_bits(values: ndarray) -> UInt8[ndarray, "height width"]:
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise ValueError("holds values that are not finite numbers")
    if values.dtype.kind == "f":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high < 1 << 16:
        low, high = 0.0, float((1 << 16) - 1)
    scale = 255 / (high - low) if high > low else 0.0
    # In fp64, which holds every 32-bit integer.
    scaled: ndarray = np.rint((values.astype(np.float64) - low) * scale)
    return scaled.astype(np.uint8)
