"""Change neurons inside a `with` block: ablate, scale, set, or add noise to their rows of W_out.

Activations are changed by hooks, and rows of W_out are restored from a copy. So the weights are byte-equal afterwards,
even after an exception or when blocks are nested. Changes hold during `generate` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.errors import InputError
from mmray.models.experts import Experts
from mmray.models.linear import added_to_rows, is_quantised
from mmray.models.loading import LoadedModel
from mmray.models.mlp_inputs import MlpInputs
from mmray.models.parts import output_rows, set_output_rows


def by_layer(
    model: LoadedModel, neurons: Iterable[str | tuple[int, int]], module: str = "language"
) -> dict[int, list[int]]:
    """Group neurons, by name or as (layer, unit), by layer, without repeats; raises InputError for an unknown neuron.

    One name alone stands for that neuron.
    """
    groups: dict[int, dict[int, None]] = {}
    widths = [projection.width for projection in model.parts.mlps(module)]
    for neuron in [neurons] if isinstance(neurons, str) else neurons:
        layer, unit = model.names.parse(neuron) if isinstance(neuron, str) else neuron
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
def scale(
    model: LoadedModel, neurons: Iterable[str | tuple[int, int]], factor: float, *, last: bool = False
) -> Iterator[None]:
    """Multiply the activation of these neurons by `factor` at every position; `last` as in `set_to`."""
    with _change(model, neurons, lambda selected: selected * factor, last=last):
        yield


@contextmanager
def set_to(
    model: LoadedModel,
    neurons: Iterable[str | tuple[int, int]],
    value: float | Sequence[float],
    *,
    last: bool = False,
) -> Iterator[None]:
    """Set the activation of these neurons to `value`, one for all or one per neuron, at every position.

    With `last`, only at the last position of each forward: in `generate`, where a token of the reply is predicted.
    Raises InputError for `last` at experts, which see tokens without their positions.
    """
    named = [neurons] if isinstance(neurons, str) else list(neurons)
    values = [value] * len(named) if isinstance(value, (int, float)) else value
    by_neuron = {
        model.names.parse(neuron) if isinstance(neuron, str) else neuron: own
        for neuron, own in zip(named, values, strict=True)
    }
    with ExitStack() as stack:
        for layer, units in by_layer(model, named).items():
            own = torch.tensor([by_neuron[layer, unit] for unit in units])
            stack.enter_context(_changed_layer(model, "language", layer, units, partial(_replaced, own), last))
        yield


def _replaced(values: Float[Tensor, " neuron"], selected: Float[Tensor, "... neuron"]) -> Float[Tensor, "... neuron"]:
    return values.to(selected).expand_as(selected)


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
    """Replace these neurons' rows of W_out inside the `with` block; afterwards restore the same bytes.

    Quantised weights stay as they are: the difference is added to what the layer writes.
    """
    network, projection, index = model.network, model.projections[layer], torch.tensor(units)
    module = network.get_submodule(projection.path)
    if not projection.experts and is_quantised(module):
        with added_to_rows(module, index, rows - output_rows(network, projection)[index.to(rows.device)]):
            yield
        return
    # Restored from a copy: subtracting the change would round.
    before = output_rows(network, projection)[units].clone()
    set_output_rows(network, projection, index, rows)
    try:
        yield
    finally:
        set_output_rows(network, projection, index, before)


@contextmanager
def changed_inputs(
    model: LoadedModel, layer: int, units: Int[Tensor, " unit"], added: Float[Tensor, "unit part hidden"]
) -> Iterator[None]:
    """Add to the rows that these neurons read (`MlpInputs.rows`) inside the block; afterwards restore the same bytes.

    Raises InputError for MLPs without such rows.
    """
    inputs = MlpInputs.of(model.network, model.projections[layer])
    if inputs is None:
        raise InputError(
            f"{model.name}: what neurons of layer {layer} read can't be changed; load it with --dtype bf16"
        )
    before = inputs.rows(units)
    # In fp32, as rows of W_out are changed: a small change can vanish in a sum of half-precision numbers.
    inputs.set_rows(units, before.float() + added.to(before.device))
    try:
        yield
    finally:
        inputs.set_rows(units, before)


@contextmanager
def _change(
    model: LoadedModel,
    neurons: Iterable[str | tuple[int, int]],
    change: Callable[[Tensor], Tensor],
    module: str = "language",
    *,
    last: bool = False,
) -> Iterator[None]:
    with ExitStack() as stack:
        for layer, units in by_layer(model, neurons, module).items():
            stack.enter_context(_changed_layer(model, module, layer, units, change, last))
        yield


def _changed_layer(
    model: LoadedModel, module: str, layer: int, units: list[int], change: Callable[[Tensor], Tensor], last: bool
) -> AbstractContextManager[None]:
    projection, index = model.parts.mlps(module)[layer], torch.tensor(units)
    if not projection.experts:
        return _changed_input(model.network.get_submodule(projection.path), index, change, last)
    if last:
        raise InputError(f"{model.name}: experts can't be changed at the last position alone")
    return Experts.of(model.network, projection).changed(index, change)


@contextmanager
def _changed_input(module: nn.Module, units: Tensor, change: Callable[[Tensor], Tensor], last: bool) -> Iterator[None]:
    def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # A copy: hooks that ran before may have kept the tensor.
        activation = arguments[0].clone()
        index = units.to(activation.device)
        # A view: what is written to it is written to the copy.
        part = activation[..., -1:, :] if last else activation
        part[..., index] = change(part[..., index])
        return (activation, *arguments[1:])

    with module.register_forward_pre_hook(replace):
        yield
