"""See neurons while the model runs: hooks that read and never write, removed whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.experts import has_plain_gate, routed_activation
from mmray.models.layout import Projection

Receive: TypeAlias = Callable[[int, Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]], None]
"""Called once a projection and forward with the projection's index, its activations, and what opens the neurons.

Rows are tokens, batch by batch (row = sample · positions + position). The third is the gate's Linear output, before the
non-linearity (without a routing weight, and zero at experts that a token is not routed to); where no gate can be read
so, it is the activation itself.
"""


@contextmanager
def capture_activations(
    network: PreTrainedModel, projections: Sequence[Projection], receive: Receive
) -> Iterator[None]:
    """Hand the inputs of these MLP output projections to `receive` as each forward computes them.

    Activations are those of the network's own number format, and must not be changed in place.
    """
    with ExitStack() as stack:
        for index, projection in enumerate(projections):
            module = network.get_submodule(projection.path)
            if projection.experts:
                stack.enter_context(routed_activation(module, partial(receive, index)))
            else:
                gate = network.get_submodule(projection.gate) if projection.gate else None
                _tap_linear(stack, index, module, gate, projection.width, receive)
        yield


@contextmanager
def capture_input(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand the first input of a module (the final norm, say) to `receive` at each forward."""

    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        receive(arguments[0])

    handle = module.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


def _tap_linear(
    stack: ExitStack, index: int, module: nn.Module, gate: nn.Module | None, width: int, receive: Receive
) -> None:
    opened: list[Tensor] = []

    def see_gate(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        opened.append(output[..., :width])

    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        activation = arguments[0].flatten(0, -2)
        receive(index, activation, opened.pop().flatten(0, -2) if opened else activation)

    if gate is not None:
        stack.callback(gate.register_forward_hook(see_gate).remove)
    stack.callback(module.register_forward_pre_hook(see).remove)


def has_gates(network: PreTrainedModel, projections: Sequence[Projection]) -> bool:
    """Return whether the gates of these projections can be read after their non-linearity."""
    try:
        for projection in projections:
            gate_function(network, projection)
    except InputError:
        return False
    return True


def gate_function(network: PreTrainedModel, projection: Projection) -> Callable[[Tensor], Tensor]:
    """Return the non-linearity between the gate's Linear and the factor; the identity where there is no gate.

    Raises InputError where it can't be told from what it works on.
    """
    if projection.gate is None and not projection.experts:
        return lambda opened: opened
    gate = projection.path if projection.gate is None else projection.gate
    mlp = network.get_submodule(gate if projection.experts else gate.rpartition(".")[0])
    for name in ("act_fn", "act", "activation_fn"):
        function = getattr(mlp, name, None)
        if callable(function) and (not projection.experts or has_plain_gate(mlp)):
            return function  # type: ignore[no-any-return]
    raise InputError(f"{gate}: no activation function next to it; use --score contribution")
