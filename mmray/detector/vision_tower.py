"""Vision towers of a joint model: images to pixels, pixels to the embedding that both heads read."""

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
"""Module that turns tower features into image tokens, in the families with one tower and one projector."""


class VisionTower(Protocol):
    """A tower: pixels to the embedding t, whose patches follow row by row after `skipped` others (CLS)."""

    skipped: int
    side: int
    """Patches per row and per column of the grid."""

    @property
    def padding_colour(self) -> tuple[int, int, int]:
        """The colour around an image, for towers that see more than the image."""

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return images as the tower takes them."""

    def covers(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part (x, y, width, height) that the tower sees of an image of this width and height."""

    def __call__(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row patch width"]:
        """Return the embedding of images."""


class OwnTower(nn.Module):
    """A LLaVA's own tower: the embedding is its projector's input, without CLS where the model drops it."""

    skipped = 0
    padding_colour = (0, 0, 0)
    """Unused: this tower never sees more than the image."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        if model.parts.family not in ("llava", "vipllava"):
            raise InputError(
                f"{model.name}: {model.parts.family} has no tower with one projector; detector heads need a LLaVA"
            )
        self.model = model
        vision = model.network.config.vision_config
        self.side = int(vision.image_size) // int(vision.patch_size)

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return images as the model's own image processor prepares them."""
        processed: Any = self.model.processor.image_processor(images=list(images), return_tensors="pt")
        pixels: Tensor = processed["pixel_values"]
        return pixels

    def covers(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of the image that the processor's centre crop keeps."""
        return covered(self.model, size[0] / size[1])

    def forward(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row patch width"]:
        """Return the features that enter the projector."""
        # Captured, because which layer's features enter, and whether with CLS, is up to the model's configuration.
        features: list[Tensor] = []
        with capture_input(self.projector, features.append):
            self.model.network.get_image_features(pixel_values)
        return features[0]

    @property
    def projector(self) -> nn.Module:
        """The model's own projector, from an embedding to image tokens."""
        found: nn.Module = self.model.network.get_submodule(PROJECTOR)
        return found


def open_tower(name: str, device: torch.device | str) -> VisionTower:
    """Load the tower of a checkpoint: an OWL-ViT's or OWLv2's up to its last layer, or a LLaVA's own.

    Raises InputError for other kinds.
    """
    if is_owl(name):
        return open_owl(name, device).tower
    return OwnTower(load(name, device=device))
