"""Which token of the sequence is which patch of the image: a family's image tokens as a grid, with tiles assembled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, log

import torch

from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch

WHOLE = (0.0, 0.0, 1.0, 1.0)
NEWLINES = ("llava_next", "llava_onevision")
"""Families that write the downscaled image first, then the large one with a newline token after each row."""


@dataclass(frozen=True)
class Patches:
    """A grid over the image."""

    rows: int
    columns: int
    positions: tuple[int, ...]
    """Position in the sequence of each patch's token, row by row."""
    covers: tuple[float, float, float, float] = WHOLE
    """The part (x, y, width, height) of the image under the grid, in 0..1: less than all after a centre crop."""


def patches_of(model: LoadedModel, batch: Batch, row: int, size: tuple[int, int]) -> Patches | None:
    """Return the patches of the image in a row of the batch; `size` is its width and height in pixels.

    None if its tokens are no grid (a Q-Former's), or the image is not in the sequence.
    """
    positions = batch.image_positions(row)
    if not positions or model.parts.image != "tokens" or hasattr(model.network.config, "qformer_config"):
        return None
    aspect = size[0] / size[1]
    if "image_grid_thw" in batch.inputs:
        return _merged(model, batch, row, positions)
    side = tile_side(model, positions)
    if side is None:
        return None
    if model.parts.family in NEWLINES:
        return _with_newlines(positions, side, aspect)
    # One square is the whole image; more are tiles of it.
    tiles = len(positions) // side**2
    if tiles == 1:
        return Patches(side, side, tuple(positions), covered(model, aspect))
    return _tiled(positions, side, tiles, aspect)


def _merged(model: LoadedModel, batch: Batch, row: int, positions: Sequence[int]) -> Patches | None:
    """Return the grid of Qwen-VL, whose inputs give its size before neighbouring patches are merged."""
    merge = int(getattr(model.processor.image_processor, "merge_size", 1))
    _, height, width = (int(number) for number in batch.inputs["image_grid_thw"][row])
    rows, columns = height // merge, width // merge
    return Patches(rows, columns, tuple(positions)) if rows * columns == len(positions) else None


def tile_side(model: LoadedModel, positions: Sequence[int]) -> int | None:
    """Return the side of the square that one tile's tokens form; None if they form none."""
    config = model.network.config
    tokens = getattr(config, "image_seq_length", None) or getattr(model.processor, "image_seq_len", None)
    # With tiles and newlines, a square total would be a coincidence.
    total = None if model.parts.family in NEWLINES else len(positions)
    for count in (tokens, getattr(config, "mm_tokens_per_image", None), total):
        if count and isqrt(int(count)) ** 2 == int(count) and len(positions) % int(count) == 0 and int(count) > 1:
            return isqrt(int(count))
    vision = getattr(config, "vision_config", None)
    patch, pixels = getattr(vision, "patch_size", None), getattr(vision, "image_size", None)
    if isinstance(patch, int) and isinstance(pixels, int) and len(positions) >= (pixels // patch) ** 2:
        return pixels // patch
    return None


def _with_newlines(positions: Sequence[int], side: int, aspect: float) -> Patches:
    """Return the grid of LLaVA-NeXT: the downscaled image's square, then the large image's rows with newline tokens."""
    rest = positions[side**2 :]
    shapes = [(rows, len(rest) // rows - 1) for rows in range(1, len(rest) + 1) if len(rest) % rows == 0]
    shapes = [(rows, columns) for rows, columns in shapes if columns > 0]
    if not shapes:
        return Patches(side, side, tuple(positions[: side**2]))
    # Of all grids with this number of tokens, the one of the image's aspect.
    rows, columns = min(shapes, key=lambda shape: abs(log(shape[1] / shape[0] / aspect)))
    lines = torch.tensor(rest).reshape(rows, columns + 1)[:, :columns]
    return Patches(rows, columns, tuple(lines.flatten().tolist()))


def _tiled(positions: Sequence[int], side: int, tiles: int, aspect: float) -> Patches:
    """Return the grid of Idefics3 and InternVL: square tiles row by row, without the downscaled image after them."""
    count = tiles - 1
    shapes = [(count // across, across) for across in range(1, count + 1) if count % across == 0]
    down, across = min(shapes, key=lambda shape: abs(log(shape[1] / shape[0] / aspect)))
    grid = torch.tensor(positions[: count * side**2]).reshape(down, across, side, side).transpose(1, 2)
    return Patches(down * side, across * side, tuple(grid.flatten().tolist()))


def covered(model: LoadedModel, aspect: float) -> tuple[float, float, float, float]:
    """Return the part of the image (x, y, width, height) that the processor's centre crop leaves."""
    processor = getattr(model.processor, "image_processor", None)
    if not getattr(processor, "do_center_crop", False) or aspect == 1:
        return WHOLE
    if aspect > 1:
        return ((1 - 1 / aspect) / 2, 0.0, 1 / aspect, 1.0)
    return (0.0, (1 - aspect) / 2, 1.0, aspect)
