"""Encoded images (JPEG, PNG, …) to RGB pictures; the package has no other decoder.

Pillow's `convert("RGB")` alone would lose what an image shows: it drops alpha, clips 16 bits to 8, and knows nothing of
orientation. Here

- transparent pixels show a background, white unless told otherwise;
- the EXIF orientation is applied;
- 16-bit grey is divided by 257; so are 32-bit integers within 0..65535, others are stretched from their range;
- floats are multiplied by 255 if they lie within 0..1, others are stretched from their range;
- CMYK and YCbCr are converted without colour profiles; of an animation the first frame is taken.
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

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read. Pillow knows more; one of them, EPS, it hands to a program that runs the file's code."""
LARGEST_FILE = 64 << 20
"""Encoded bytes above which an image is refused, where possible before they are read."""
LARGEST_IMAGE = 178_956_970
"""Pixels above which an image is refused before it is decoded: a small file can unfold to gigabytes."""
LARGEST_RATIO = 200
"""Long side ÷ short side above which an image is refused: processors that scale the short side would enlarge it."""
ORIENTATION = 0x0112
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation → how the stored pixels have to be turned."""


@phase("decode")
def decode_image(encoded: bytes, background: str = BACKGROUND) -> Image:
    """Return the picture in RGB; raises ValueError, with the reason, for anything that is none."""
    try:
        if len(encoded) > LARGEST_FILE:
            raise ValueError(too_large(len(encoded), LARGEST_FILE))
        image = PIL.Image.open(io.BytesIO(encoded), formats=_formats())
        _check_size(*image.size)
        return to_rgb(image, background)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"more than {LARGEST_IMAGE:,} pixels") from error
    except PIL.UnidentifiedImageError as error:
        # Pillow's own words for it hold an address in memory, which no two runs share.
        raise ValueError("of no known format") from error
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def image_size(encoded: bytes) -> tuple[int, int]:
    """Return width and height as stored, nothing decoded; zeros for anything that `decode_image` refuses."""
    try:
        size = PIL.Image.open(io.BytesIO(encoded), formats=_formats()).size
        _check_size(*size)
    except Exception:  # noqa: BLE001  `decode_image` has the reason
        return 0, 0
    return size


def read_image(file: Path | str, background: str = BACKGROUND) -> Image:
    """Return the picture in a file in RGB; raises ValueError, with the reason, for anything that is none."""
    try:
        return decode_image(read_file(Path(file), LARGEST_FILE), background)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def to_rgb(image: Image, background: str = BACKGROUND) -> Image:
    """Return a picture of any mode in RGB, by the rules above; raises ValueError for a mode that has none."""
    image.load()  # before anything is asked about it: a PNG's EXIF data may come last
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        found = _grey(image, background)
    elif image.has_transparency_data:
        seen = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        found = PIL.Image.alpha_composite(PIL.Image.new("RGBA", seen.size, background), seen).convert("RGB")
    else:
        found = image.convert("RGB")
    return found if turn is None else found.transpose(turn)


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST_IMAGE:
        raise ValueError(f"{width:,} × {height:,} pixels, more than {LARGEST_IMAGE:,}")
    if max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(f"{width:,} × {height:,} pixels: one side is more than {LARGEST_RATIO} times the other")


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow reads: not every build has all."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (ValueError, TypeError, KeyError, SyntaxError, OSError, struct.error):
        return 1  # Damaged EXIF data says nothing; the pixels are there all the same.


def _grey(image: Image, background: str) -> Image:
    """Return a picture of one deep channel in RGB; where it says which value is transparent, that is background."""
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
    scaled: ndarray = np.rint((values.astype(np.float64) - low) * scale)
    return scaled.astype(np.uint8)
