"""Measure what changed neurons do to words, many times on the same images.

Blocks before the first changed neuron compute the same as without the change, so a forward resumes there. On two cores
this makes hundreds of concepts × methods affordable. It is validated on a batch first, because not every family's
blocks can be resumed; where that fails, each forward runs the whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.models.blocks import BlockRecorder
from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_probability
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward
from mmray.neurons.token_positions import TokenPosition, flat_positions

Neurons = Sequence[tuple[int, int]]
TOLERANCE = 1e-3
"""Largest difference in nats between a resumed and a whole forward."""
LIKELY = 10.0
"""Tokens less likely than this, in nats, are not compared: their log-probability is dominated by rounding."""
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a network raises if its blocks can't be resumed."""


class Ablator:
    """A batch with the positions of its nouns, run once unchanged and then with neurons changed."""

    @torch.inference_mode()
    def __init__(
        self,
        model: LoadedModel,
        batch: Batch,
        positions: Sequence[TokenPosition],
        recorder: BlockRecorder | None = None,
        *,
        resumes: bool | None = None,
    ) -> None:
        """Run the batch unchanged.

        `recorder` is of an earlier forward of the same batch. `resumes` is what an earlier batch showed about this
        model, which saves a forward.
        """
        self.model, self.batch, self.positions = model, batch, positions
        self.rows = flat_positions(batch, positions)
        self.tokens = torch.tensor([occurrence.token for occurrence in positions])
        self.recorder = recorder or self._record()
        self.unchanged = self._log_probabilities(self._read(self.recorder.final))
        self.resumes = self._validate() if resumes is None else resumes

    @torch.inference_mode()
    def changed(self, neurons: Neurons, change: AbstractContextManager[None]) -> Float[Tensor, " position"]:
        """Return how much a change of these neurons adds to the log-probability of each position's token, in nats."""
        first = min(layer for layer, _ in neurons)
        with change:
            # Inside the block: a resumed forward runs the changed blocks, where the change has its hooks.
            return (self._resumed(first) if self.resumes else self._whole()) - self.unchanged

    def _record(self) -> BlockRecorder:
        recorder = BlockRecorder(self.model)
        with recorder.recording():
            forward(self.model, self.batch)
        return recorder

    def _validate(self) -> bool:
        try:
            # What is added between blocks need not stay the same under a change.
            if not self.recorder.plain:
                return False
            resumed = self._resumed(0)
        except FAILURES:
            return False
        likely = self.unchanged > -LIKELY
        return bool((resumed - self.unchanged)[likely].abs().le(TOLERANCE).all())

    def _resumed(self, first: int) -> Float[Tensor, " position"]:
        return self._log_probabilities(self.recorder.resume(first, self.rows))

    def _whole(self) -> Float[Tensor, " position"]:
        final: list[Tensor] = []
        with capture_input(self.model.norm, final.append):
            forward(self.model, self.batch)
        return self._log_probabilities(self._read(final[-1]))

    def _read(self, states: Tensor) -> Float[Tensor, "position hidden"]:
        return states.flatten(0, -2)[self.rows.to(states.device)]

    def _log_probabilities(self, states: Float[Tensor, "position hidden"]) -> Float[Tensor, " position"]:
        return log_probability(self.model, states, self.tokens).cpu()
