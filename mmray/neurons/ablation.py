"""Measure what changed neurons do to words, over and over on the same images, from where the first neuron stands.

The blocks before the first changed neuron compute what they compute without it: their result is kept from one plain
forward, and a forward with neurons changed starts behind them. On two cores that is what makes hundreds of concepts ×
methods affordable. Not every family's blocks can be entered so: it is proven on a batch first, and where it fails each
forward runs the whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.models.blocks import BlockRecorder
from mmray.models.capture import capture_input
from mmray.models.interventions import ablate
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_probability
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward
from mmray.neurons.token_positions import TokenPosition

Neurons = Sequence[tuple[int, int]]
TOLERANCE = 1e-3
"""Nats between the blocks run once more and the plain forward, at most."""
LIKELY = 10.0
"""Nats below which a token's log-probability is not compared."""
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a network raises whose blocks can't be entered again."""


class Ablator:
    """Images with the places of their nouns, run once as they are and then with neurons changed."""

    @torch.inference_mode()
    def __init__(
        self,
        model: LoadedModel,
        batch: Batch,
        places: Sequence[TokenPosition],
        passage: BlockRecorder | None = None,
        *,
        resumes: bool | None = None,
    ) -> None:
        """Run the batch as it is.

        `passage` is that of a forward of the same batch, where there was one; `resumes` what an earlier batch has shown
        of this model's blocks, which is one more forward to show.
        """
        self.model, self.batch, self.places = model, batch, places
        self.rows = torch.tensor([place.row * batch.positions + place.position for place in places])
        self.tokens = torch.tensor([place.token for place in places])
        self.passage = passage or self._passed()
        self.untouched = self._log_probabilities(self._read(self.passage.end))
        self.resumes = self._proven() if resumes is None else resumes

    def change(self, neurons: Neurons) -> Float[Tensor, " place"]:
        """Return of each place how much zeroing these neurons adds to the log-probability of its noun, in nats."""
        return self.changed(neurons, ablate(self.model, neurons))

    @torch.inference_mode()
    def changed(self, neurons: Neurons, change: AbstractContextManager[None]) -> Float[Tensor, " place"]:
        """Return of each place how much a change of these neurons adds to the log-probability of its noun, in nats."""
        first = min(layer for layer, _ in neurons)
        with change:
            return (self._from(first) if self.resumes else self._whole()) - self.untouched

    def _passed(self) -> BlockRecorder:
        passage = BlockRecorder(self.model)
        with passage.recording():
            forward(self.model, self.batch)
        return passage

    def _proven(self) -> bool:
        try:
            again = self._from(0)
        except FAILURES:
            return False
        likely = self.untouched > -LIKELY
        return bool((again - self.untouched)[likely].abs().le(TOLERANCE).all())

    def _from(self, first: int) -> Float[Tensor, " place"]:
        return self._log_probabilities(self.passage.again(first, self.rows))

    def _whole(self) -> Float[Tensor, " place"]:
        kept: list[Tensor] = []
        with capture_input(self.model.norm, kept.append):
            forward(self.model, self.batch)
        return self._log_probabilities(self._read(kept[-1]))

    def _read(self, states: Tensor) -> Float[Tensor, "place hidden"]:
        return states.flatten(0, -2)[self.rows.to(states.device)]

    def _log_probabilities(self, states: Float[Tensor, "place hidden"]) -> Float[Tensor, " place"]:
        return log_probability(self.model, states, self.tokens).cpu()
