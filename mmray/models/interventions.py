"""Change neurons while a `with` block lasts: ablate, scale, set, or add noise to what they write.

Activations are changed by hooks, and rows of W_out are put back from a copy, so that the weights are byte-equal
afterwards, also after an exception and when blocks are nested. They hold during `generate` too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows

NEURON = re.compile(r"L(\d+)\.u(\d+)")
"""How a neuron is written: `L7.u89` is unit 89 of layer 7."""


def parse_neuron(name: str) -> tuple[int, int]:
    """Return (layer, unit) of a neuron written `L7.u89`; raises InputError for anything else."""
    match = NEURON.fullmatch(name.strip())
    if match is None:
        raise InputError(f"{name!r} is not a neuron; write layer and unit as L7.u89")
    return int(match[1]), int(match[2])


def by_layer(model: LoadedModel, neurons: Iterable[str | tuple[int, int]]) -> dict[int, list[int]]:
    """Group neurons, written `L7.u89` or given as (layer, unit), by layer; raises InputError for one outside."""
    groups: dict[int, list[int]] = {}
    for neuron in neurons:
        layer, unit = parse_neuron(neuron) if isinstance(neuron, str) else neuron
        if not (0 <= layer < len(model.widths) and 0 <= unit < model.widths[layer]):
            raise InputError(
                f"L{layer}.u{unit} is outside {model.name}: {len(model.widths)} layers of {max(model.widths)} neurons"
            )
        groups.setdefault(layer, []).append(unit)
    return groups


@contextmanager
def ablate(model: LoadedModel, neurons: Iterable[str | tuple[int, int]]) -> Iterator[None]:
    """Set the activation of these neurons to zero at every position."""
    with set_to(model, neurons, 0.0):
        yield


@contextmanager
def scale(model: LoadedModel, neurons: Iterable[str | tuple[int, int]], factor: float) -> Iterator[None]:
    """Multiply the activation of these neurons by `factor` at every position."""
    with _change(model, neurons, lambda selected: selected * factor):
        yield


@contextmanager
def set_to(model: LoadedModel, neurons: Iterable[str | tuple[int, int]], value: float) -> Iterator[None]:
    """Set the activation of these neurons to `value` at every position."""
    with _change(model, neurons, lambda selected: torch.full_like(selected, value)):
        yield


@contextmanager
def add_noise(
    model: LoadedModel, neurons: Iterable[str | tuple[int, int]], sigma: float, seed: int = 0
) -> Iterator[None]:
    """Add independent Gaussian noise of standard deviation `sigma` to these neurons' rows of W_out (Pan et al. 2024)."""
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        for layer, units in by_layer(model, neurons).items():
            rows = output_rows(model.network, model.projections[layer])
            index = torch.tensor(units, device=rows.device)
            noise = sigma * torch.randn((len(units), rows.shape[1]), generator=generator)
            stack.enter_context(changed_rows(rows, index, rows[index] + noise.to(rows)))
        yield


@contextmanager
def changed_rows(rows: Float[Tensor, "neuron hidden"], index: Tensor, values: Tensor) -> Iterator[None]:
    """Replace rows of a weight while the block lasts, and put the very bytes back afterwards."""
    before = rows[index].clone()
    with torch.no_grad():
        rows[index] = values
    try:
        yield
    finally:
        with torch.no_grad():
            rows[index] = before


@contextmanager
def _change(
    model: LoadedModel, neurons: Iterable[str | tuple[int, int]], change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    with ExitStack() as stack:
        for layer, units in by_layer(model, neurons).items():
            module = model.network.get_submodule(model.projections[layer].path)
            stack.enter_context(_changed_input(module, torch.tensor(units), change))
        yield


@contextmanager
def _changed_input(module: nn.Module, units: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        activation = arguments[0].clone()
        index = units.to(activation.device)
        activation[..., index] = change(activation[..., index])
        return (activation, *arguments[1:])

    handle = module.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()
