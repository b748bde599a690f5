"""A LLaVA that sees by another tower, for as long as a block lasts: the joint model where all measures are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn

from mmray.detector.vision_tower import PROJECTOR, VisionTower
from mmray.errors import InputError
from mmray.models.loading import LoadedModel


@dataclass(frozen=True, eq=False)
class OtherSight:
    """Another tower with a network aligned to the model's tokens, measured as an edit of the model is."""

    sight: VisionTower
    network: nn.Module
    purposes: tuple[Any, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Have the model's projector answer with the aligned network's tokens of the images that are asked about."""
        processor = model.processor.image_processor
        remembering = _Remembering(processor)

        looking = False

        def answer(_: nn.Module, __: tuple[Any, ...], own: Tensor) -> Tensor:
            nonlocal looking
            if looking:
                return own  # the sight is this model's own tower, which goes by the projector too
            looking = True
            try:
                pixels = self.sight.pixels(remembering.images).to(own.device, own.dtype)
                tokens: Tensor = self.network(self.sight(pixels))
            finally:
                looking = False
            if tokens.shape != own.shape:
                raise InputError(
                    f"{model.name}: {tuple(tokens.shape)} tokens of the aligned network in place of {tuple(own.shape)}"
                )
            return tokens.to(own.dtype)

        model.processor.image_processor = remembering
        handle = model.network.get_submodule(PROJECTOR).register_forward_hook(answer)
        try:
            yield
        finally:
            handle.remove()
            model.processor.image_processor = processor


class _Remembering:
    """An image processor as it is, that keeps the images that it was given last: pixels alone don't tell them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.images: list[Image] = []

    def __call__(self, images: Any, **options: Any) -> Any:
        self.images = [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
        return self.inner(images, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
