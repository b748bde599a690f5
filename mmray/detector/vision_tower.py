"""Towers as a joint model sees through them: images to pixels, pixels to the embedding that all else is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from mmray.detector.owl import is_owl, open_owl
from mmray.errors import InputError
from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel, load
from mmray.models.patches import covered

PROJECTOR = "model.multi_modal_projector"
"""Module that makes image tokens of the tower's features, in the families that have a tower and one projector."""


class VisionTower(Protocol):
    """A tower: pixels to the embedding t, whose patches stand row by row behind `skipped` others (CLS)."""

    skipped: int
    side: int
    """Patches in a row of the grid, and rows."""

    @property
    def filling(self) -> tuple[int, int, int]:
        """The colour that the tower sees around an image, where it sees more than that."""

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return images as the tower takes them."""

    def covers(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part (x, y, width, height) that the tower sees of an image of this width and height."""

    def __call__(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row patch width"]:
        """Return the embedding of images."""


class OwnTower(nn.Module):
    """A LLaVA's own tower: the embedding is what goes into its projector, without CLS where the model leaves it out."""

    skipped = 0
    filling = (0, 0, 0)
    """Nowhere: it sees a part of an image, or all of it."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        if model.parts.family not in ("llava", "vipllava"):
            raise InputError(
                f"{model.name}: {model.parts.family} has no tower with one projector; heads of a detector go on a LLaVA"
            )
        self.model = model
        vision = model.network.config.vision_config
        self.side = int(vision.image_size) // int(vision.patch_size)

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return what the model's own image processor makes of the images."""
        processed: Any = self.model.processor.image_processor(images=list(images), return_tensors="pt")
        pixels: Tensor = processed["pixel_values"]
        return pixels

    def covers(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part that is left where the processor cuts out the middle."""
        return covered(self.model, size[0] / size[1])

    def forward(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row patch width"]:
        """Return the features that the projector is given."""
        seen: list[Tensor] = []
        with capture_input(self.projector, seen.append):
            self.model.network.get_image_features(pixel_values)
        return seen[0]

    @property
    def projector(self) -> nn.Module:
        """The model's own projector, which makes image tokens of an embedding."""
        found: nn.Module = self.model.network.get_submodule(PROJECTOR)
        return found


def open_tower(name: str, device: torch.device | str) -> VisionTower:
    """Load the tower of a checkpoint: an OWL-ViT's or OWLv2's up to the last layer, or a LLaVA's own.

    Raises InputError for other kinds.
    """
    if is_owl(name):
        return open_owl(name, device).sight
    return OwnTower(load(name, device=device))
