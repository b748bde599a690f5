"""Neurons of fused experts: no Linear's input shows them, so they are recomputed from the experts' inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Change: TypeAlias = Callable[[Float[Tensor, "token unit"]], Float[Tensor, "token unit"]]


class _Changes:
    """The active changes of a module's neurons, in order, and the one hook that applies them all."""

    def __init__(self, module: nn.Module) -> None:
        self.changes: dict[object, tuple[Int[Tensor, " unit"], Change]] = {}
        self.handle = module.register_forward_hook(_apply_changes, with_kwargs=True)


_CHANGED: WeakKeyDictionary[nn.Module, _Changes] = WeakKeyDictionary()


@contextmanager
def routed_activation(
    module: nn.Module, receive: Callable[[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"]], None]
) -> Iterator[None]:
    """Call `receive` with the experts' activations and gates at each forward.

    Works with all of transformers' implementations (eager, batched, grouped), because only inputs are read.
    """

    def capture(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], __: Tensor) -> None:
        activation, gate = _routed(module, **_inputs(arguments, named))
        receive(_changed(module, activation), activation if gate is None else gate)

    with module.register_forward_hook(capture, with_kwargs=True):
        yield


@contextmanager
def changed_routed_activation(module: nn.Module, units: Int[Tensor, " unit"], change: Change) -> Iterator[None]:
    """Make the experts write as if `change` had been applied to these neurons' activations.

    `change` maps activations (token, unit), which include the routing weight. It sees zeros where a token is not
    routed to the neuron's expert, and its result for them is written too. Nested changes apply in order; activations
    read meanwhile are the changed ones.
    """
    active = _CHANGED.get(module) or _CHANGED.setdefault(module, _Changes(module))
    key = object()
    active.changes[key] = units, change
    try:
        yield
    finally:
        del active.changes[key]
        if not active.changes:
            active.handle.remove()
            del _CHANGED[module]


def _apply_changes(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
    before, _ = _routed(module, **_inputs(arguments, named))
    index = torch.unique(torch.cat([units for units, _ in _CHANGED[module].changes.values()])).to(before.device)
    # The output is linear in the activations: adding the difference avoids running the experts again.
    return output + (_changed(module, before) - before)[:, index] @ expert_rows(module, index)


def _changed(module: nn.Module, activation: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
    """Return the activations with the active changes; the same tensor if there are none."""
    if module not in _CHANGED:
        return activation
    changed = activation.clone()
    for units, change in _CHANGED[module].changes.values():
        index = units.to(changed.device)
        changed[:, index] = change(changed[:, index])
    return changed


def expert_rows(module: Any, units: Int[Tensor, " unit"]) -> Float[Tensor, "unit hidden"]:
    """Return a copy of these neurons' rows of W_out; the whole weight is never unfolded."""
    return by_unit(module)[_expert_and_unit(module, units)]


@torch.no_grad()
def set_expert_rows(module: Any, units: Int[Tensor, " unit"], rows: Float[Tensor, "unit hidden"]) -> None:
    """Write these neurons' rows of W_out in place."""
    by_unit(module)[_expert_and_unit(module, units)] = rows


def by_unit(module: Any) -> Float[Tensor, "expert unit hidden"]:
    """Return a view of the output projections' weight, indexed by neuron: [expert, unit]."""
    # GPT-OSS and others store the transpose of a Linear's weight.
    weight: Tensor = module.down_proj
    return weight if getattr(module, "is_transposed", False) else weight.transpose(1, 2)


def expert_activation(
    module: nn.Module,
    hidden_states: Float[Tensor, "token hidden"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> Float[Tensor, "token neuron"]:
    """Return each neuron's activation times the routing weight of its expert; zero for experts not routed to.

    Neuron = expert * units + unit. Multiplied by the rows of W_out this gives the experts' output, except for a bias:
    the routing weight is a factor, so it can stand before the projection as well as after. The result is dense: 100 MB
    for 256 tokens of Qwen3-VL-30B's 98,304 neurons per layer.
    """
    return _changed(module, _routed(module, hidden_states, top_k_index, top_k_weights)[0])


def _routed(
    module: Any,
    hidden_states: Float[Tensor, "token hidden"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"] | None]:
    """Return the activations as the experts compute them, and their gates; None without plain gates."""
    down = module.down_proj
    transposed = getattr(module, "is_transposed", False)
    experts, units, _ = by_unit(module).shape
    has_gate = getattr(module, "has_gate", True)
    entry = module.gate_up_proj if has_gate else module.up_proj
    bias = getattr(module, "gate_up_proj_bias" if has_gate else "up_proj_bias", None)
    hidden, chosen, weights = (given.to(down.device) for given in (hidden_states, top_k_index, top_k_weights))
    activation = hidden.new_zeros(hidden.shape[0], experts, units)
    gate = torch.zeros_like(activation) if has_plain_gate(module) else None
    # Expert-parallel models mark an expert on another device by an id past the last expert.
    for expert in torch.unique(chosen[chosen < experts]).tolist():
        token, choice = torch.where(chosen == expert)
        matrix = entry[expert].T if transposed else entry[expert]
        # Only the tokens routed to this expert, as in the experts' own forward.
        entered = functional.linear(hidden[token], matrix, None if bias is None else bias[expert])
        passed = module._apply_gate(entered) if has_gate else module.act_fn(entered)
        activation[token, expert] = passed * weights[token, choice, None].to(passed.dtype)
        if gate is not None:
            gate[token, expert] = entered[:, :units]
    return activation.flatten(1), None if gate is None else gate.flatten(1)


def has_plain_gate(module: Any) -> bool:
    """Return whether the experts compute act_fn(first half) · second half of their up projection."""
    # Tried on numbers instead of read from names: some experts clamp or interleave the halves.
    if not getattr(module, "has_gate", True):
        return False
    units = by_unit(module).shape[1]
    entered = torch.linspace(20.0, -20.0, 2 * units, dtype=module.down_proj.dtype, device=module.down_proj.device)
    gate, factor = entered.chunk(2)
    return torch.allclose(module._apply_gate(entered[None])[0], module.act_fn(gate) * factor)


def _inputs(arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of the experts' forward, by the names that all of transformers' experts use."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    inputs = dict(zip(names, arguments, strict=False)) | named
    return {name: inputs[name] for name in names}


def _expert_and_unit(module: Any, units: Int[Tensor, " unit"]) -> tuple[Tensor, Tensor]:
    """Return each neuron's expert, and its unit within the expert."""
    per_expert = by_unit(module).shape[1]
    units = units.to(module.down_proj.device)
    return units // per_expert, units % per_expert
