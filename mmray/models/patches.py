"""Which token of the sequence is which patch of the image: a family's image tokens as a grid, with tiles assembled.

For models outside the table the grid is a guess from the number of tokens, and must be shown: darkening a quarter of an
image has to change the tokens of this quarter most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import isqrt, log
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image, fromarray
from torch import Tensor, nn

from mmray.models.blocks import block_of
from mmray.models.families import habits_of
from mmray.models.layout import PROBED
from mmray.models.loading import LoadedModel
from mmray.models.processing import noise_image
from mmray.models.prompting import Batch, encode, prompt_text, tokenize_caption
from mmray.models.streams import by_token

WHOLE = (0.0, 0.0, 1.0, 1.0)


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

    None if its tokens are no grid (a Q-Former's) or none that is shown to be right, or if the image is not in the
    sequence.
    """
    if model.parts.family == PROBED and not _grids_hold(model):
        return None
    return _grid(model, batch, row, size)


def _grid(model: LoadedModel, batch: Batch, row: int, size: tuple[int, int]) -> Patches | None:
    positions = batch.image_positions(row)
    if not positions or model.parts.image != "tokens" or hasattr(model.network.config, "qformer_config"):
        return None
    aspect = size[0] / size[1]
    if "image_grid_thw" in batch.inputs:
        return _merged(model, batch, row, positions)
    side = tile_side(model, positions)
    if side is None:
        return None
    if len(positions) == side**2 + 1:
        # A token of the whole image comes first (GIT).
        positions = positions[1:]
    if habits_of(model.network.config).newlines:
        return _with_newlines(positions, side, aspect)
    # One square is the whole image; more are tiles of it.
    tiles = len(positions) // side**2
    if tiles == 1:
        return Patches(side, side, tuple(positions), covered(model, aspect))
    return _tiled(positions, side, tiles, aspect)


CLEARLY = 1.5
"""Factor by which the grid's own match must explain changes better than the next best: of 50 tiny models, 1.6 and more
where the grid is right, 1.0 to 1.4 where it is not."""
_HOLD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _grids_hold(model: LoadedModel) -> bool:
    """Return whether the patches of a square and of a wide picture are where the grid says; run once per model."""
    if model.network not in _HOLD:
        found = [_grid_holds(model, noise_image().resize(size)) for size in ((96, 96), (150, 80))]
        _HOLD[model.network] = True in found and False not in found
    return _HOLD[model.network]


@torch.inference_mode()
def _grid_holds(model: LoadedModel, image: Image) -> bool | None:
    """Return whether darkening a quarter of a picture changes the tokens of this quarter most; None without a grid."""
    batch, before = _enter(model, image)
    grid = _grid(model, batch, 0, image.size)
    if grid is None or min(grid.rows, grid.columns) < 2:
        return None
    index, rows, columns = torch.tensor(grid.positions), grid.rows // 2, grid.columns // 2
    changes = torch.empty(4, 4)
    for quarter in range(4):
        down, across = divmod(quarter, 2)
        pixels = np.array(image)
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        part = slice(down * height, (down + 1) * height), slice(across * width, (across + 1) * width)
        # By a fifth only: what attention spreads to other patches is then small.
        pixels[part] = (pixels[part] * 0.8).astype(pixels.dtype)
        _, after = _enter(model, fromarray(pixels))
        changed = (after - before).float().norm(dim=-1).cpu()[index].reshape(grid.rows, grid.columns)
        halves = changed[:rows], changed[-rows:]
        quarters = [half for whole in halves for half in (whole[:, :columns], whole[:, -columns:])]
        changes[quarter] = torch.stack([values.mean() for values in quarters])
    # How well each way to match quarters of the picture and of the grid explains the changes. Some tokens move more
    # than others whatever is darkened, and some quarters move all tokens more: factors that all matches share.
    logs = changes.clamp_min(1e-30).log()
    matches = {order: float(logs[range(4), order].sum()) for order in permutations(range(4))}
    own = matches.pop((0, 1, 2, 3))
    return own - max(matches.values()) > log(CLEARLY)


def _enter(model: LoadedModel, image: Image) -> tuple[Batch, Float[Tensor, "position hidden"]]:
    """Return the batch of one caption of an image, and what enters the decoder's first block."""
    prompt = prompt_text(model, None, None)
    tokens, offsets = tokenize_caption(model, prompt, "A dog.")
    batch = encode(model, [prompt], [image], [tokens], [offsets])
    entered: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        entered.append(next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor)))

    with block_of(model, 0).register_forward_pre_hook(enter, with_kwargs=True):
        model.network(**batch.to(model.device, model.network.dtype))
    return batch, by_token(entered[0]).flatten(0, -2)


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
    total = None if habits_of(config).newlines else len(positions)
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
