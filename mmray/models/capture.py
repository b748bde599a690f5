"""Read activations while the model runs: hooks that never write, and are removed even after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import InputError
from mmray.models.experts import Experts
from mmray.models.layout import Projection

Receive: TypeAlias = Callable[[int, Float[Tensor, "row neuron"], Float[Tensor, "row neuron"]], None]
"""Called per projection and forward with the projection's index, its activations, and its gates.

Rows are tokens: row = sample · positions + position. A gate is the gate Linear's output before the non-linearity,
without routing weight, and zero at experts that a token is not routed to. Without a readable gate it is the activation.
"""


@contextmanager
def capture_activations(
    network: PreTrainedModel, projections: Sequence[Projection], receive: Receive
) -> Iterator[None]:
    """Call `receive` with the inputs of these MLP output projections as each forward computes them.

    Activations have the network's dtype. They must not be changed in place: the network goes on with them.
    """
    with ExitStack() as stack:
        for index, projection in enumerate(projections):
            if projection.experts:
                stack.enter_context(Experts.of(network, projection).captured(partial(receive, index)))
            else:
                module = network.get_submodule(projection.path)
                gate = network.get_submodule(projection.gate) if projection.gate else None
                _hook_linear(stack, index, module, gate, projection.width, receive)
        yield


@contextmanager
def capture_input(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `receive` with the first input of a module (such as the final norm) at each forward."""

    def capture(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        receive(arguments[0])

    with module.register_forward_pre_hook(capture):
        yield


def _hook_linear(
    stack: ExitStack, index: int, module: nn.Module, gate: nn.Module | None, width: int, receive: Receive
) -> None:
    gates: list[Tensor] = []

    def capture_gate(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        # A fused Linear computes the other factor too; the gate comes first.
        gates.append(output[..., :width])

    def capture(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        activation = arguments[0].flatten(0, -2)
        # The gate's Linear ran before the output projection of the same MLP.
        receive(index, activation, gates.pop().flatten(0, -2) if gates else activation)

    if gate is not None:
        stack.enter_context(gate.register_forward_hook(capture_gate))
    stack.enter_context(module.register_forward_pre_hook(capture))


def has_gates(network: PreTrainedModel, projections: Sequence[Projection]) -> bool:
    """Return whether the gates of all these projections can be read after their non-linearity."""
    try:
        for projection in projections:
            gate_function(network, projection)
    except InputError:
        return False
    return True


def nonlinearity(mlp: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the activation function of an MLP; None if it has none that can be called by itself."""
    for name in ("act_fn", "act", "activation_fn", "gelu_impl"):
        if callable(found := getattr(mlp, name, None)):
            return _after_sparsity(mlp, found)
    return None


def _after_sparsity(mlp: Any, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the non-linearity after what sets all but a token's largest gates to zero first (some of Gemma 3n's)."""
    return (lambda gate: function(mlp._gaussian_topk(gate))) if getattr(mlp, "activation_sparsity", 0) else function


def gate_function(network: PreTrainedModel, projection: Projection) -> Callable[[Tensor], Tensor]:
    """Return the non-linearity after the gate's Linear; the identity for a plain MLP.

    Raises InputError if the MLP has none that can be called by itself.
    """
    if projection.experts:
        function = Experts.of(network, projection).gate_function()
        if function is not None:
            return function
    elif projection.gate is None:
        return lambda gate: gate
    elif (found := nonlinearity(network.get_submodule(projection.gate.rpartition(".")[0]))) is not None:
        return found
    raise InputError(
        f"{projection.gate or projection.path}: no activation function next to it; use --score contribution"
    )
