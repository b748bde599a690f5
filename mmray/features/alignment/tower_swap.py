"""A LLaVA with another vision tower for as long as a with-block lasts: the joint model that is measured."""

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
class TowerSwap:
    """Another tower with a network aligned to the model's image tokens, to be measured like an edit of the model."""

    tower: VisionTower
    network: nn.Module
    purposes: tuple[Any, ...] = ()
    """Empty, as `facts`: an edit has them, and the evaluator reads them."""
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Replace the output of the model's projector by the aligned network's tokens of the same images."""
        processor = model.processor.image_processor
        recorder = _ImageRecorder(processor)
        running = False

        def replace(_: nn.Module, __: tuple[Any, ...], own: Tensor) -> Tensor:
            nonlocal running
            if running:
                return own  # the tower is this model's own, and uses the projector itself
            running = True
            try:
                pixels = self.tower.pixels(recorder.images).to(own.device, own.dtype)
                tokens: Tensor = self.network(self.tower(pixels))
            finally:
                running = False
            if tokens.shape != own.shape:
                raise InputError(
                    f"{model.name}: {tuple(tokens.shape)} tokens of the aligned network instead of {tuple(own.shape)}"
                )
            return tokens.to(own.dtype)

        # Only the images, not the model's pixels, can be given to a tower with another resolution.
        model.processor.image_processor = recorder
        handle = model.network.get_submodule(PROJECTOR).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
            model.processor.image_processor = processor


class _ImageRecorder:
    """An image processor that records its last images, because the other tower can't use this model's pixels."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.images: list[Image] = []

    def __call__(self, images: Any, **options: Any) -> Any:
        # Processors get a list of images, or one list per prompt.
        self.images = [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
        return self.inner(images, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
