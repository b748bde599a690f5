"""Neurons that nothing speaks for, to hold located ones against: drawn from all, by layer, or by activation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Neurons = Sequence[tuple[int, int]]
NEAR = 20
"""Neurons of the most similar activation that one is drawn from."""


def uniform(widths: Sequence[int], neurons: Neurons, seed: str) -> list[tuple[int, int]]:
    """Return as many neurons, drawn evenly from all the others."""
    taken = set(neurons)
    others = [(layer, unit) for layer, width in enumerate(widths) for unit in range(width)]
    return random.Random(f"uniform {seed}").sample([one for one in others if one not in taken], len(neurons))


def layer_matched(widths: Sequence[int], neurons: Neurons, seed: str) -> list[tuple[int, int]]:
    """Return as many neurons of each layer, drawn from the layer's others."""
    generator, taken = random.Random(f"layers {seed}"), set(neurons)
    drawn = []
    for layer, count in sorted(Counter(layer for layer, _ in neurons).items()):
        others = [(layer, unit) for unit in range(widths[layer]) if (layer, unit) not in taken]
        drawn += generator.sample(others, min(count, len(others)))
    return drawn


def activation_matched(
    activations: Sequence[Float[Tensor, " neuron"]], neurons: Neurons, seed: str
) -> list[tuple[int, int]]:
    """Return for each neuron another one that is about as active, in any layer: one of the NEAR most similar.

    `activations`: of every neuron by layer, the mean magnitude at the places in question.
    """
    generator = random.Random(f"activations {seed}")
    widths = [len(part) for part in activations]
    names = [(layer, unit) for layer, width in enumerate(widths) for unit in range(width)]
    values, order = torch.cat([part.abs().float().cpu() for part in activations]).sort()
    taken = set(neurons)
    drawn: list[tuple[int, int]] = []
    for layer, unit in neurons:
        at = int(torch.searchsorted(values, activations[layer][unit].abs().float().cpu()))
        reach = NEAR
        while not (free := _free(names, order, at, reach, taken)) and reach < len(names):
            reach *= 2
        if free:
            drawn.append(generator.choice(free))
            taken.add(drawn[-1])
    return drawn


def _free(
    names: Sequence[tuple[int, int]], order: Tensor, at: int, reach: int, taken: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    near = order[max(0, at - reach // 2) : at + reach // 2 + 1].tolist()
    return [names[index] for index in near if names[index] not in taken]
