"""Limit how many images are decoded at once, by a budget of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from PIL.Image import Image

from mmray.data.images import image_size
from mmray.models.loading import LoadedModel

BUDGET = 100_000_000
"""Pixels per batch. A pixel takes about 20 bytes from decoder to processor, so this is about 2 GB."""

Item = TypeVar("Item")


def within_budget(
    items: Iterable[Item], weigh: Callable[[Item], int], budget: int, most: int | None = None
) -> Iterator[list[Item]]:
    """Yield runs of items, at most `most` each, with a total weight within the budget; a heavier item is alone."""
    part: list[Item] = []
    held = 0
    for item in items:
        weight = weigh(item)
        if part and (held + weight > budget or len(part) == most):
            yield part
            part, held = [], 0
        part.append(item)
        held += weight
    if part:
        yield part


def pixels_of(model: LoadedModel, image: Image | bytes | None) -> int:
    """Return the most pixels that an image takes: decoded, or as the processor scales it.

    0 without an image, and for one that can't be decoded.
    """
    width, height = image.size if isinstance(image, Image) else image_size(image) if image is not None else (0, 0)
    return max(width * height, _scaled(model, width, height)) if width and height else 0


def _scaled(model: LoadedModel, width: int, height: int) -> int:
    """Return the pixels of an image as the processor scales it, before any crop."""
    processor = getattr(model.processor, "image_processor", None)
    size = dict(getattr(processor, "size", None) or {})
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest and longest and hasattr(processor, "merge_size"):
        return int(min(max(width * height, shortest), longest))  # Qwen-VL misuses the two names for areas.
    ratio = max(width, height) / min(width, height)
    if shortest:
        return int(min(shortest**2 * ratio, longest**2 if longest else float("inf")))
    if longest:
        return int(longest**2 / ratio)
    return int((size.get("height") or 0) * (size.get("width") or 0))
