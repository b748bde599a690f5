"""Measure what zeroing neurons does to words, over and over on the same images, from where the first neuron stands.

The blocks before the first zeroed neuron compute what they compute without it: their result is kept from one plain
forward, and a forward with neurons zeroed starts behind them. On two cores that is what makes hundreds of concepts ×
methods affordable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

import mmray
from mmray.models.capture import tap_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_probability
from mmray.models.prompting import Batch
from mmray.neurons.places import Place
from mmray.neurons.scoring import forward

Neurons = Sequence[tuple[int, int]]


class Ablator:
    """Images with the places of their nouns, run once as they are and then with neurons zeroed."""

    @torch.inference_mode()
    def __init__(self, model: LoadedModel, batch: Batch, places: Sequence[Place]) -> None:
        self.model, self.batch, self.places = model, batch, places
        self.blocks = [block_of(model, layer) for layer in range(len(model.widths))]
        self.entering: list[Tensor] = []
        with ExitStack() as taps:
            for block in self.blocks:
                taps.enter_context(tap_input(block, self.entering.append))
            self.untouched = self._log_probabilities()

    @torch.inference_mode()
    def change(self, neurons: Neurons) -> Tensor:
        """Return of each place how much zeroing these neurons adds to the log-probability of its noun, in nats."""
        first = min(layer for layer, _ in neurons)
        with mmray.ablate(self.model, neurons), resumed(self.blocks, first, self.entering[first]):
            return self._log_probabilities() - self.untouched

    def _log_probabilities(self) -> Tensor:
        kept: list[Tensor] = []
        with tap_input(self.model.norm, kept.append):
            forward(self.model, self.batch)
        rows = torch.tensor([place.row for place in self.places])
        positions = torch.tensor([place.position for place in self.places])
        tokens = torch.tensor([place.token for place in self.places])
        states = kept[-1].reshape(len(self.batch.tokens), self.batch.positions, -1)
        return log_probability(self.model, states[rows.to(states.device), positions.to(states.device)], tokens).cpu()


def block_of(model: LoadedModel, layer: int) -> nn.Module:
    """Return the decoder's block that holds a layer's MLP: the module numbered by the layer in its path."""
    path = re.match(rf".*?\.{layer}(?=\.)", model.projections[layer].path)
    assert path, model.projections[layer].path
    return model.network.get_submodule(path.group())


@contextmanager
def resumed(blocks: Sequence[nn.Module], first: int, entering: Tensor) -> Iterator[None]:
    """Skip the blocks before `first`, and have that block be entered by what entered it before."""

    def replace(_: nn.Module, arguments: tuple[object, ...]) -> tuple[object, ...]:
        return (entering, *arguments[1:])

    handle = blocks[first].register_forward_pre_hook(replace)
    for block in blocks[:first]:
        vars(block)["forward"] = lambda states, *_, **__: states
    try:
        yield
    finally:
        handle.remove()
        for block in blocks[:first]:
            del vars(block)["forward"]
