"""Masks, sets of neurons to zero: each label's own, as many random ones per layer, and those of shuffled labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from mmray.features.census.ranking import locate_index
from mmray.features.selectivity.selection import LabelSelection

SELECTED, RANDOM, SHUFFLED = "selected", "random", "shuffled"


@dataclass(frozen=True)
class Mask:
    """Neurons that are zeroed together, with their label and kind of control."""

    label: str
    control: str
    neurons: tuple[tuple[int, int], ...]
    """(layer, unit) within the module."""


def masks_of(selection: LabelSelection, labels: Sequence[str], widths: Sequence[int], seed: int) -> list[Mask]:
    """Return the masks of every label that has neurons: selected, random, and with shuffled labels if there are any."""
    generator = np.random.default_rng(seed)
    masks = []
    for number, label in enumerate(labels):
        own = selection.chosen.of(number).numpy()
        # An empty mask would measure nothing but noise.
        if not len(own):
            continue
        sets = {SELECTED: own, RANDOM: random_like(own, widths, generator)}
        if selection.shuffled is not None:
            sets[SHUFFLED] = selection.shuffled.of(number).numpy()[: len(own)]
        masks += [Mask(label, control, locate_neurons(part, widths)) for control, part in sets.items() if len(part)]
    return masks


def random_like(
    neurons: Int[ndarray, " chosen"], widths: Sequence[int], generator: np.random.Generator
) -> Int[ndarray, " chosen"]:
    """Return as many random neurons per layer, different from these as long as the layer has enough others."""
    starts = np.cumsum([0, *widths])
    drawn = []
    for start, stop in pairwise(starts):
        own = neurons[(neurons >= start) & (neurons < stop)]
        others = np.setdiff1d(np.arange(start, stop), own)
        # In a layer where most neurons are chosen, some of the random ones must be chosen ones.
        spare = generator.choice(own, max(0, len(own) - len(others)), replace=False)
        drawn += [generator.choice(others, len(own) - len(spare), replace=False), spare]
    return np.concatenate(drawn)


def locate_neurons(neurons: Iterable[int], widths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (layer, unit) of neurons, given their indices over all layers."""
    layer, unit = locate_index(widths, np.fromiter(neurons, np.int64))
    return tuple(zip(layer.tolist(), unit.tolist(), strict=True))
