"""How a neuron is written: `L7.u89` is unit 89 of layer 7."""

import re

from mmray.errors import InputError

PATTERN = re.compile(r"L(\d+)\.u(\d+)")


def neuron_name(layer: int, unit: int) -> str:
    """Return the neuron's name."""
    return f"L{layer}.u{unit}"


def parse_neuron(name: str) -> tuple[int, int]:
    """Return (layer, unit) of a name; raises InputError for anything else."""
    match = PATTERN.fullmatch(name.strip())
    if match is None:
        raise InputError(f"{name!r} is not a neuron; write layer and unit as L7.u89")
    return int(match[1]), int(match[2])
