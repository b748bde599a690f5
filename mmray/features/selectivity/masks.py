"""Masks, sets of neurons to zero: each label's own, as many random ones per layer, and those of shuffled labels.

A mask has neurons of one module, or of all modules together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from mmray.features.census.ranking import locate_index
from mmray.features.selectivity.selection import LabelSelection
from mmray.features.selectivity.settings import TOGETHER
from mmray.models.interventions import ablate
from mmray.models.loading import LoadedModel

SELECTED, RANDOM, SHUFFLED = "selected", "random", "shuffled"


@dataclass(frozen=True)
class Mask:
    """Neurons that are zeroed together, with their label, kind of control, and module, or TOGETHER."""

    label: str
    control: str
    neurons: tuple[tuple[str, int, int], ...]
    """(module, layer, unit) of each."""
    module: str = "language"


@contextmanager
def zeroed(model: LoadedModel, mask: Mask | None) -> Iterator[None]:
    """Zero a mask's neurons at every position, whichever modules they are in; none without a mask."""
    by_module: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for module, layer, unit in mask.neurons if mask else ():
        by_module[module].append((layer, unit))
    with ExitStack() as stack:
        for module, neurons in by_module.items():
            stack.enter_context(ablate(model, neurons, module=module))
        yield


def masks_of(
    selection: LabelSelection, labels: Sequence[str], widths: Sequence[int], seed: int, module: str
) -> list[Mask]:
    """Return the masks of a module's neurons, for every label that has some there.

    They are the selected neurons, random ones, and those of shuffled labels if there are any.
    """
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
        for control, part in sets.items():
            if len(part):
                located = tuple((module, layer, unit) for layer, unit in locate_neurons(part, widths))
                masks.append(Mask(label, control, located, module))
    return masks


def joined(masks: Iterable[Mask]) -> list[Mask]:
    """Return a mask per label and control with the neurons of all modules."""
    together: dict[tuple[str, str], tuple[tuple[str, int, int], ...]] = defaultdict(tuple)
    for mask in masks:
        together[mask.label, mask.control] += mask.neurons
    return [Mask(label, control, neurons, TOGETHER) for (label, control), neurons in together.items()]


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
