"""How neurons are written: `L7.u89` is unit 89 of layer 7, `L7.e12.u89` unit 89 of its expert 12."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import InputError

PATTERN = re.compile(r"L(\d+)(?:\.e(\d+))?\.u(\d+)")


@dataclass(frozen=True)
class NeuronNames:
    """The names of a model's neurons. In tables and code a neuron is (layer, unit), counted through all experts."""

    experts: tuple[tuple[int, int] | None, ...] = ()
    """Routed experts of each layer, and units of each; None for a layer without. A shared expert comes after them."""

    @classmethod
    def of(cls, experts: Sequence[Sequence[int] | None]) -> NeuronNames:
        """Return the names for a run's description of its model."""
        return cls(tuple(None if one is None else (one[0], one[1]) for one in experts))

    def name(self, layer: int, unit: int) -> str:
        """Return a neuron's name."""
        return "".join(map(str, self._spelled(layer, unit)))

    def names(self, layer: int, units: int) -> pa.StringArray:
        """Return the names of a layer's neurons, given how many there are."""
        spelled = self._spelled(layer, np.arange(units))
        columns = [one if isinstance(one, str) else pa.array(one).cast(pa.string()) for one in spelled]
        return pc.binary_join_element_wise(*columns, "")

    def _spelled(self, layer: int, unit: Any) -> list[Any]:
        """Return what the name of a neuron, or of several of a layer, is put together from: texts and numbers."""
        if (found := self._of_layer(layer)) is None:
            return [f"L{layer}.u", unit]
        # The shared expert comes last, and may be wider than the routed ones.
        expert = np.minimum(unit // found[1], found[0])
        return [f"L{layer}.e", expert, ".u", unit - expert * found[1]]

    def parse(self, name: str) -> tuple[int, int]:
        """Return (layer, unit) of a name, with or without the expert; raises InputError for anything else."""
        match = PATTERN.fullmatch(name.strip())
        if match is None:
            raise InputError(f"{name!r} is not a neuron; write layer and unit as L7.u89, or L7.e12.u89 with an expert")
        layer, unit = int(match[1]), int(match[3])
        if match[2] is None:
            return layer, unit
        expert, found = int(match[2]), self._of_layer(layer)
        if found is None:
            raise InputError(f"{name}: layer {layer} has no experts; write L{layer}.u{unit}")
        count, units = found
        # The width of a shared expert is not known here.
        if expert > count or (expert < count and unit >= units):
            raise InputError(
                f"{name}: layer {layer} has experts e0 to e{count - 1} of {units} units; a shared one is e{count}"
            )
        return layer, expert * units + unit

    def _of_layer(self, layer: int) -> tuple[int, int] | None:
        return self.experts[layer] if layer < len(self.experts) else None


PLAIN = NeuronNames()
"""Names without experts."""
