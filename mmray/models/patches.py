"""Which token of the sequence is which part of the image: the grid of a family's image tokens, tiles put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, log

import torch

from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch

WHOLE = (0.0, 0.0, 1.0, 1.0)
NEWLINES = ("llava_next", "llava_onevision")
"""Families that put a token for a line's end behind each row of the large image, and before it the whole one small."""


@dataclass(frozen=True)
class Patches:
    """A grid over the image, row by row: the position in the sequence of the token that each patch is.

    `covers` is the part of the image (x, y, width, height) that the grid lies over: of an image whose middle the
    processor cuts out, that.
    """

    rows: int
    columns: int
    positions: tuple[int, ...]
    covers: tuple[float, float, float, float] = WHOLE


def patches_of(model: LoadedModel, batch: Batch, row: int, size: tuple[int, int]) -> Patches | None:
    """Return the patches of the image in a row of the batch, whose width and height in pixels are `size`.

    None where its tokens are no grid: those of a Q-Former, or of a family that the image doesn't reach by the sequence.
    """
    runs = [range(run.start, run.stop) for run in batch.runs if run.row == row and run.modality == "image"]
    if not runs or model.parts.image != "tokens" or hasattr(model.network.config, "qformer_config"):
        return None
    positions = [position for run in runs for position in run]
    aspect = size[0] / size[1]
    if "image_grid_thw" in batch.inputs:
        return _merged(model, batch, row, positions)
    side = _side(model, positions)
    if side is None:
        return None
    if model.parts.family in NEWLINES:
        return _with_newlines(positions, side, aspect)
    tiles = len(positions) // side**2
    if tiles == 1:
        return Patches(side, side, tuple(positions), covered(model, aspect))
    return _tiled(positions, side, tiles, aspect)


def _merged(model: LoadedModel, batch: Batch, row: int, positions: Sequence[int]) -> Patches | None:
    """Qwen-VL: the grid comes with the pixels, before neighbouring patches are merged."""
    merge = int(getattr(model.processor.image_processor, "merge_size", 1))
    _, height, width = (int(number) for number in batch.inputs["image_grid_thw"][row])
    rows, columns = height // merge, width // merge
    return Patches(rows, columns, tuple(positions)) if rows * columns == len(positions) else None


def _side(model: LoadedModel, positions: Sequence[int]) -> int | None:
    """Return the side of the square that one tile's tokens are; None where they are none."""
    config = model.network.config
    tokens = getattr(config, "image_seq_length", None) or getattr(model.processor, "image_seq_len", None)
    # All that tiles and newlines come to is a square by chance.
    whole = None if model.parts.family in NEWLINES else len(positions)
    for count in (tokens, getattr(config, "mm_tokens_per_image", None), whole):
        if count and isqrt(int(count)) ** 2 == int(count) and len(positions) % int(count) == 0 and int(count) > 1:
            return isqrt(int(count))
    vision = getattr(config, "vision_config", None)
    patch, pixels = getattr(vision, "patch_size", None), getattr(vision, "image_size", None)
    if isinstance(patch, int) and isinstance(pixels, int) and len(positions) >= (pixels // patch) ** 2:
        return pixels // patch
    return None


def _with_newlines(positions: Sequence[int], side: int, aspect: float) -> Patches:
    """LLaVA-NeXT: the small whole image's square first, then the large image's rows, each with a token at its end."""
    rest = positions[side**2 :]
    shapes = [(rows, len(rest) // rows - 1) for rows in range(1, len(rest) + 1) if len(rest) % rows == 0]
    shapes = [(rows, columns) for rows, columns in shapes if columns > 0]
    if not shapes:
        return Patches(side, side, tuple(positions[: side**2]))
    rows, columns = min(shapes, key=lambda shape: abs(log(shape[1] / shape[0] / aspect)))
    lines = torch.tensor(rest).reshape(rows, columns + 1)[:, :columns]
    return Patches(rows, columns, tuple(lines.flatten().tolist()))


def _tiled(positions: Sequence[int], side: int, tiles: int, aspect: float) -> Patches:
    """Idefics3, InternVL: square tiles row by row, and the whole image small behind them, which is left out."""
    count = tiles - 1
    shapes = [(count // across, across) for across in range(1, count + 1) if count % across == 0]
    down, across = min(shapes, key=lambda shape: abs(log(shape[1] / shape[0] / aspect)))
    grid = torch.tensor(positions[: count * side**2]).reshape(down, across, side, side).transpose(1, 2)
    return Patches(down * side, across * side, tuple(grid.flatten().tolist()))


def covered(model: LoadedModel, aspect: float) -> tuple[float, float, float, float]:
    """Return the part of the image that is left when its middle is cut out as a square."""
    processor = getattr(model.processor, "image_processor", None)
    if not getattr(processor, "do_center_crop", False) or aspect == 1:
        return WHOLE
    if aspect > 1:
        return ((1 - 1 / aspect) / 2, 0.0, 1 / aspect, 1.0)
    return (0.0, (1 - aspect) / 2, 1.0, aspect)
