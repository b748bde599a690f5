"""Change neurons inside a `with` block: ablate, scale, set, or add noise to their rows of W_out.

Activations are changed by hooks, and rows of W_out are restored from a copy. So the weights are byte-equal afterwards,
even after an exception or when blocks are nested. Changes hold during `generate` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.experts import Experts
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows, set_output_rows
from mmray.neuron_names import parse_neuron


def by_layer(
    model: LoadedModel, neurons: Iterable[str | tuple[int, int]], module: str = "language"
) -> dict[int, list[int]]:
    """Group neurons, `L7.u89` or (layer, unit), by layer, without repeats; raises InputError for an unknown neuron.

    One name alone stands for that neuron.
    """
    groups: dict[int, dict[int, None]] = {}
    widths = [projection.width for projection in model.parts.image_path(module)]
    for neuron in [neurons] if isinstance(neurons, str) else neurons:
        layer, unit = parse_neuron(neuron) if isinstance(neuron, str) else neuron
        if not (0 <= layer < len(widths) and 0 <= unit < widths[layer]):
            raise InputError(
                f"L{layer}.u{unit} is outside {model.name}: {len(widths)} layers of {max(widths, default=0)} neurons"
            )
        groups.setdefault(layer, {})[unit] = None
    return {layer: list(units) for layer, units in groups.items()}


@contextmanager
def ablate(model: LoadedModel, neurons: Iterable[str | tuple[int, int]], *, module: str = "language") -> Iterator[None]:
    """Set the activation of these neurons to zero at every position; `module` is the decoder's unless given."""
    with _change(model, neurons, torch.zeros_like, module):
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
    """Add Gaussian noise of standard deviation `sigma` to these neurons' rows of W_out (Pan et al. 2024)."""
    # Drawn on the CPU, so that every device gets the same noise.
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        for layer, units in by_layer(model, neurons).items():
            rows = output_rows(model.network, model.projections[layer])[units]
            noise = sigma * torch.randn(rows.shape, generator=generator)
            stack.enter_context(changed_rows(model, layer, units, rows + noise.to(rows)))
        yield


@contextmanager
def changed_rows(
    model: LoadedModel, layer: int, units: list[int], rows: Float[Tensor, "neuron hidden"]
) -> Iterator[None]:
    """Replace these neurons' rows of W_out inside the `with` block; afterwards restore the same bytes."""
    network, projection, index = model.network, model.projections[layer], torch.tensor(units)
    # Restored from a copy: subtracting the change would round.
    before = output_rows(network, projection)[units].clone()
    set_output_rows(network, projection, index, rows)
    try:
        yield
    finally:
        set_output_rows(network, projection, index, before)


@contextmanager
def _change(
    model: LoadedModel,
    neurons: Iterable[str | tuple[int, int]],
    change: Callable[[Tensor], Tensor],
    module: str = "language",
) -> Iterator[None]:
    with ExitStack() as stack:
        for layer, units in by_layer(model, neurons, module).items():
            projection = model.parts.image_path(module)[layer]
            if projection.experts:
                changed = Experts.of(model.network, projection).changed(torch.tensor(units), change)
            else:
                changed = _changed_input(model.network.get_submodule(projection.path), torch.tensor(units), change)
            stack.enter_context(changed)
        yield


@contextmanager
def _changed_input(module: nn.Module, units: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # A copy: hooks that ran before may have kept the tensor.
        activation = arguments[0].clone()
        index = units.to(activation.device)
        activation[..., index] = change(activation[..., index])
        return (activation, *arguments[1:])

    with module.register_forward_pre_hook(replace):
        yield
