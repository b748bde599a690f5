"""Activity of the vision tower's or the projector's neurons, counted in the census' own forward.

All image positions that the module computes count, including a class token, but no padding. Prompt and caption never
reach these modules. As in the language decoder, an image of several samples counts once per label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
from torch import Tensor

from mmray.errors import InputError
from mmray.models.capture import capture_activations
from mmray.models.families import QUESTION_MASK, TILED
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, TokenSpan
from mmray.neurons.statistics import TokenStatistics

SIZES = ("image_grid_thw", "image_sizes", "pixel_attention_mask")
"""Inputs with one row per sample that determine how many positions an image has in the tower."""


class ModuleActivity:
    """Counts one module's activity over a shard; does nothing for the language decoder, which is counted anyway."""

    def __init__(self, model: LoadedModel, module: str) -> None:
        self.model = model
        self.module = module
        self.projections = model.parts.mlps(module) if module != "language" else ()
        if module != "language" and not self.projections:
            raise InputError(f"{model.name}: --module {module}: there is no MLP in it; see mmray check-model")
        self.statistics = TokenStatistics([projection.width for projection in self.projections])
        self._captured: list[tuple[int, Tensor, Tensor]] = []
        self._batch: Batch | None = None

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Capture the module's activations in the forward inside the `with` block.

        Raises ValueError if images differ in size, because the module's rows can't be assigned to samples then. Such a
        batch has to be split into single samples.
        """
        # Rows of all images are concatenated, without any mark of where one ends.
        if self.projections and batch.rows > 1 and not uniform(batch):
            raise ValueError("images of different sizes share no batch with --module vision or projector")
        self._captured, self._batch = [], batch
        try:
            with capture_activations(self.model.network, self.projections, lambda *found: self._captured.append(found)):
                yield
        except BaseException:
            self._forget()  # A failed batch is tried again in halves, and needs the memory.
            raise
        if not self._captured:
            self._forget()

    def count(self, labels: Sequence[dict[str, str]], images: Sequence[str | None]) -> list[int]:
        """Reduce the captured batch, to count once `commit` is called; nothing for a batch without images.

        `images` are the images' digests. Returns per sample how many neurons have sums that are not finite.
        """
        if self._batch is None:
            return [0] * len(labels)
        # Positions of all images are concatenated, and `watching` has made sure that each has as many.
        spans = image_spans(self.model, self._batch, len(self._captured[0][1]) // self._batch.rows)
        self.statistics.begin(labels, spans, images, self._batch.paths)
        for layer, activation, gate in self._captured:
            self.statistics.add(layer, activation.detach(), gate.detach())
        return self.statistics.non_finite()

    def commit(self) -> None:
        """Count the reduced batch."""
        if self._batch is not None:
            self.statistics.commit()
            self._forget()

    def _forget(self) -> None:
        self._captured, self._batch = [], None

    def activity_table(self) -> pa.Table:
        """Return the module's rows of the shard's table `activity`."""
        return self.statistics.activity_table(self.module)


def image_spans(model: LoadedModel, batch: Batch, positions: int) -> list[TokenSpan]:
    """Return which of a module's positions, so many per image, are each sample's image's: all but padded tiles."""
    vision = getattr(model.network.config, "vision_config", None)
    mask = batch.inputs.get(TILED.get(getattr(vision, "model_type", ""), ""))
    if vision is None or mask is None:
        return [TokenSpan(row, 0, positions, "image") for row in range(len(batch.tokens))]
    # Mllama's samples never share a row.
    tiles = mask.flatten(1)
    # A tile's rows are its class token and patches, then padding.
    rows, patches = positions // tiles.shape[1], 1 + (vision.image_size // vision.patch_size) ** 2
    return [TokenSpan(row, tile * rows, tile * rows + patches, "image") for row, tile in tiles.nonzero().tolist()]


def question_spans(batch: Batch) -> list[TokenSpan]:
    """Return the positions of each sample's question in the projector's TEXT_BRANCH."""
    lengths = batch.inputs[QUESTION_MASK].sum(dim=1).tolist()
    return [TokenSpan(row, 0, length, "text") for row, length in enumerate(lengths)]


def uniform(batch: Batch) -> bool:
    """Return whether every image of a batch has as many positions in the vision tower as the next."""
    inputs: Mapping[str, Tensor] = batch.inputs
    sizes = [inputs[name] for name in SIZES if name in inputs]
    if any(len(size) != batch.rows or bool((size != size[:1]).any()) for size in sizes):
        return False
    pixels = inputs.get("pixel_values")
    # Qwen lists the patches of all images, and their grids tell them apart. Else the first dimension is the samples.
    return pixels is None or "image_grid_thw" in inputs or len(pixels) == batch.rows
