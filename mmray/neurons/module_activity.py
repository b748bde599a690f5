"""The activity of the vision tower's or the projector's neurons, counted next to that of the language decoder.

All positions of the image that the module computes count, a class token among them, but for those that only fill up.
Prompt and caption never get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
from torch import Tensor

from mmray.errors import InputError
from mmray.models.capture import capture_activations
from mmray.models.families import TILED
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, TokenSpan
from mmray.neurons.statistics import TokenStatistics

SIZES = ("image_grid_thw", "image_sizes", "pixel_attention_mask")
"""Inputs with a row a sample that tell how much of the tower an image takes."""


class ModuleActivity:
    """Counts one module's activity over a shard; of the language decoder, which is counted anyway, nothing."""

    def __init__(self, model: LoadedModel, module: str) -> None:
        self.model = model
        self.module = module
        found = model.parts.of(module) if module != "language" else ()
        # The Q-Former's other branch reads the question: its rows are no places of the image.
        self.projections = tuple(projection for projection in found if not projection.reads_text)
        if module != "language" and not self.projections:
            raise InputError(f"{model.name}: --module {module}: there is no MLP in it; see mmray check-model")
        self.statistics = TokenStatistics([projection.width for projection in self.projections])
        self._seen: list[tuple[int, Tensor, Tensor]] = []
        self._batch: Batch | None = None

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """See the module while the block runs the batch; raises ValueError where its rows can't be told by sample.

        Images of different sizes take different parts of a module's rows: then a batch has to be one sample.
        """
        if self.projections and len(batch.tokens) > 1 and not uniform(batch):
            raise ValueError("images of different sizes share no batch with --module vision or projector")
        self._seen, self._batch = [], batch
        try:
            with capture_activations(self.model.network, self.projections, lambda *seen: self._seen.append(seen)):
                yield
        except BaseException:
            self._forget()  # what failed may be tried again in halves, and needs the memory
            raise
        if not self._seen:
            self._forget()

    def count(self, labels: Sequence[dict[str, str]]) -> list[int]:
        """Count what was seen of a batch until `commit`, and nothing where it had no image.

        Return of each sample how many neurons have sums that are not finite.
        """
        if self._batch is None:
            return [0] * len(labels)
        runs = image_runs(self.model, self._batch, len(self._seen[0][1]) // len(labels))
        self.statistics.begin(labels, runs)
        for layer, activation, opened in self._seen:
            self.statistics.add(layer, activation.detach(), opened.detach())
        return self.statistics.unsound()

    def commit(self) -> None:
        """Keep what was counted of a batch."""
        if self._batch is not None:
            self.statistics.commit()
            self._forget()

    def _forget(self) -> None:
        self._seen, self._batch = [], None

    def activity_table(self) -> pa.Table:
        """Return the module's rows of the shard's `activity`."""
        return self.statistics.activity_table(self.module)


def image_runs(model: LoadedModel, batch: Batch, positions: int) -> list[TokenSpan]:
    """Return which of a module's rows, so many a sample, are the image's own: all, but where tiles are filled up."""
    vision = getattr(model.network.config, "vision_config", None)
    mask = batch.inputs.get(TILED.get(getattr(vision, "model_type", ""), ""))
    if vision is None or mask is None:
        return [TokenSpan(row, 0, positions, "image") for row in range(len(batch.tokens))]
    tiles = mask.flatten(1)
    rows, patches = positions // tiles.shape[1], 1 + (vision.image_size // vision.patch_size) ** 2
    return [TokenSpan(row, tile * rows, tile * rows + patches, "image") for row, tile in tiles.nonzero().tolist()]


def uniform(batch: Batch) -> bool:
    """Return whether every sample of a batch takes as many rows of the vision tower as the next."""
    inputs: Mapping[str, Tensor] = batch.inputs
    sizes = [inputs[name] for name in SIZES if name in inputs]
    if any(len(size) != len(batch.tokens) or bool((size != size[:1]).any()) for size in sizes):
        return False
    pixels = inputs.get("pixel_values")
    # Patches of all images in one list (Qwen) are told apart by their grids, else the first dimension is the samples.
    return pixels is None or "image_grid_thw" in inputs or len(pixels) == len(batch.tokens)
