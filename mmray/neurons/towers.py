"""The activity of the vision tower's or the projector's neurons, counted beside that of the language decoder.

All positions of the image that the module computes count, a class token among them. Prompt and caption never get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
from torch import Tensor

from mmray.errors import InputError
from mmray.models.capture import tap
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch, Run
from mmray.neurons.statistics import TokenStatistics

SIZES = ("image_grid_thw", "image_sizes", "pixel_attention_mask", "aspect_ratio_mask")
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

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """See the module while the block runs the batch; raises ValueError where its rows can't be told by sample.

        Images of different sizes take different parts of a module's rows: then a batch has to be one sample.
        """
        self._seen = []
        if self.projections and len(batch.tokens) > 1 and not uniform(batch):
            raise ValueError("images of different sizes share no batch with --module vision or projector")
        with tap(self.model.network, self.projections, lambda *seen: self._seen.append(seen)):
            yield

    def commit(self, labels: Sequence[dict[str, str]]) -> None:
        """Count what was seen of a batch; nothing where it had no image."""
        if not self._seen:
            return
        positions = len(self._seen[0][1]) // len(labels)
        self.statistics.begin(labels, [Run(row, 0, positions, "image") for row in range(len(labels))])
        for layer, activation, opened in self._seen:
            self.statistics.add(layer, activation.detach(), opened.detach())
        self.statistics.commit()
        self._seen = []

    def activity_table(self) -> pa.Table:
        """Return the module's rows of the shard's `activity`."""
        return self.statistics.activity_table(self.module)


def uniform(batch: Batch) -> bool:
    """Tell whether every sample of a batch takes as many rows of the vision tower as the next."""
    inputs: Mapping[str, Tensor] = batch.inputs
    sizes = [inputs[name] for name in SIZES if name in inputs]
    if any(len(size) != len(batch.tokens) or bool((size != size[:1]).any()) for size in sizes):
        return False
    pixels = inputs.get("pixel_values")
    # Patches of all images in one list (Qwen) are told apart by their grids, else the first dimension is the samples.
    return pixels is None or "image_grid_thw" in inputs or len(pixels) == len(batch.tokens)
