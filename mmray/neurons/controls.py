"""Control neurons to compare located ones with: drawn from all, from the same layers, or with similar activation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Neurons = Sequence[tuple[int, int]]
NEAR = 20
"""A control is drawn from this many neurons of the most similar activation."""


def uniform(widths: Sequence[int], neurons: Neurons, seed: str) -> list[tuple[int, int]]:
    """Return as many other neurons, or as there are, drawn uniformly from all layers."""
    taken = set(neurons)
    # In a fixed order, so that a seed always draws the same neurons.
    every = [(layer, unit) for layer, width in enumerate(widths) for unit in range(width)]
    others = [one for one in every if one not in taken]
    return random.Random(f"uniform {seed}").sample(others, min(len(neurons), len(others)))


def layer_matched(widths: Sequence[int], neurons: Neurons, seed: str) -> list[tuple[int, int]]:
    """Return as many other neurons of each layer, or as there are."""
    generator, taken = random.Random(f"layers {seed}"), set(neurons)
    drawn = []
    for layer, count in sorted(Counter(layer for layer, _ in neurons).items()):
        others = [(layer, unit) for unit in range(widths[layer]) if (layer, unit) not in taken]
        drawn += generator.sample(others, min(count, len(others)))
    return drawn


def activation_matched(
    activations: Sequence[Float[Tensor, " neuron"]], neurons: Neurons, seed: str
) -> list[tuple[int, int]]:
    """Return for each neuron another one, of any layer, among the NEAR most similar in activation.

    `activations` has every neuron's mean magnitude at the positions in question, by layer.
    """
    generator = random.Random(f"activations {seed}")
    widths = [len(part) for part in activations]
    names = [(layer, unit) for layer, width in enumerate(widths) for unit in range(width)]
    # Sorted, so that neurons of similar activation are neighbours.
    values, order = torch.cat([part.abs().float().cpu() for part in activations]).sort()
    taken = set(neurons)
    drawn: list[tuple[int, int]] = []
    for layer, unit in neurons:
        rank = int(torch.searchsorted(values, activations[layer][unit].abs().float().cpu()))
        count, free = NEAR, _free(names, order, rank, NEAR, taken)
        # Many neurons of one activation may use up the neighbourhood.
        while not free and count < len(names):
            count *= 2
            free = _free(names, order, rank, count, taken)
        if free:
            drawn.append(generator.choice(free))
            taken.add(drawn[-1])
    return drawn


def _free(
    names: Sequence[tuple[int, int]], order: Tensor, rank: int, count: int, taken: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    near = order[max(0, rank - count // 2) : rank + count // 2 + 1].tolist()
    return [names[index] for index in near if names[index] not in taken]
