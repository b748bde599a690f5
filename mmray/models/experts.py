"""Read the neurons of fused experts, which no Linear's input shows: recomputed from what the experts were given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Change: TypeAlias = Callable[[Float[Tensor, "token unit"]], Float[Tensor, "token unit"]]


class _Rewriting:
    """The changes of a module's neurons that hold now, first made first, and the one hook that writes them all."""

    def __init__(self, module: nn.Module) -> None:
        self.changes: dict[object, tuple[Int[Tensor, " unit"], Change]] = {}
        self.handle = module.register_forward_hook(_rewrite, with_kwargs=True)


_REWRITTEN: WeakKeyDictionary[nn.Module, _Rewriting] = WeakKeyDictionary()


@contextmanager
def routed_activation(
    module: nn.Module, receive: Callable[[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"]], None]
) -> Iterator[None]:
    """Hand over the experts' activations at each forward, and what opens them, tokens as the experts see them.

    The forward is not touched, whichever of transformers' implementations (eager, batched, grouped) computes it.
    """

    def see(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], __: Tensor) -> None:
        activation, opened = _routed(module, **_given(arguments, named))
        receive(_changed(module, activation), activation if opened is None else opened)

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed_routed_activation(module: nn.Module, units: Int[Tensor, " unit"], change: Change) -> Iterator[None]:
    """Let the experts write what they would write if `change` had been applied to these neurons' activations.

    `change` takes and gives activations (token, unit), with the routing weight in them; it sees zeros where a token
    is not routed to the neuron's expert, and what it makes of them is written too. Changes within one another are
    applied in turn, and whoever reads the activations meanwhile reads them changed.
    """
    rewriting = _REWRITTEN.get(module) or _REWRITTEN.setdefault(module, _Rewriting(module))
    key = object()
    rewriting.changes[key] = units, change
    try:
        yield
    finally:
        del rewriting.changes[key]
        if not rewriting.changes:
            rewriting.handle.remove()
            del _REWRITTEN[module]


def _rewrite(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
    before, _ = _routed(module, **_given(arguments, named))
    index = torch.unique(torch.cat([units for units, _ in _REWRITTEN[module].changes.values()])).to(before.device)
    return output + (_changed(module, before) - before)[:, index] @ expert_rows(module, index)


def _changed(module: nn.Module, activation: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
    """Return the activations with the changes that hold now; the same tensor where none does."""
    if module not in _REWRITTEN:
        return activation
    changed = activation.clone()
    for units, change in _REWRITTEN[module].changes.values():
        index = units.to(changed.device)
        changed[:, index] = change(changed[:, index])
    return changed


def expert_rows(module: Any, units: Int[Tensor, " unit"]) -> Float[Tensor, "unit hidden"]:
    """Return a copy of these neurons' rows of W_out, without unfolding the whole weight."""
    expert, unit = _place(module, units)
    down: Tensor = module.down_proj
    return down[expert, unit] if getattr(module, "is_transposed", False) else down[expert, :, unit]


@torch.no_grad()
def set_expert_rows(module: Any, units: Int[Tensor, " unit"], rows: Float[Tensor, "unit hidden"]) -> None:
    """Write these neurons' rows of W_out in place."""
    expert, unit = _place(module, units)
    if getattr(module, "is_transposed", False):
        module.down_proj[expert, unit] = rows
    else:
        module.down_proj[expert, :, unit] = rows


def expert_activation(
    module: nn.Module,
    hidden_states: Float[Tensor, "token hidden"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> Float[Tensor, "token neuron"]:
    """Return what multiplies each neuron's row of W_out: its activation times the routing weight of its expert.

    Neuron = expert * units + unit. Zero where a token is not routed to the expert. Times the rows of W_out this is
    the experts' output (but for a bias of theirs): the routing weight is a factor, so it may stand before the
    projection as well as after. A dense result takes tokens * experts * units numbers: 100 MB for 256 tokens of
    Qwen3-VL-30B's 98,304 neurons a layer.
    """
    return _changed(module, _routed(module, hidden_states, top_k_index, top_k_weights)[0])


def _routed(
    module: Any,
    hidden_states: Float[Tensor, "token hidden"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> tuple[Float[Tensor, "token neuron"], Float[Tensor, "token neuron"] | None]:
    """Return the activations as the experts compute them, and the gate's half of what enters; None without such."""
    down = module.down_proj
    transposed = getattr(module, "is_transposed", False)
    experts, units = down.shape[0], down.shape[1 if transposed else 2]
    has_gate = getattr(module, "has_gate", True)
    entry = module.gate_up_proj if has_gate else module.up_proj
    bias = getattr(module, "gate_up_proj_bias" if has_gate else "up_proj_bias", None)
    hidden, chosen, weights = (given.to(down.device) for given in (hidden_states, top_k_index, top_k_weights))
    activation = hidden.new_zeros(hidden.shape[0], experts, units)
    opened = torch.zeros_like(activation) if has_plain_gate(module) else None
    # Expert-parallel models mark a choice that lives elsewhere by an id past the last expert: no expert takes it.
    for expert in torch.unique(chosen[chosen < experts]).tolist():
        token, choice = torch.where(chosen == expert)
        matrix = entry[expert].T if transposed else entry[expert]
        entered = functional.linear(hidden[token], matrix, None if bias is None else bias[expert])
        passed = module._apply_gate(entered) if has_gate else module.act_fn(entered)
        activation[token, expert] = passed * weights[token, choice, None].to(passed.dtype)
        if opened is not None:
            opened[token, expert] = entered[:, :units]
    return activation.flatten(1), None if opened is None else opened.flatten(1)


def has_plain_gate(module: Any) -> bool:
    """Return whether the experts' gate is the first half of what enters, `act_fn` opens it, and the rest is a factor.

    Tried rather than read, for some experts mix or bound the halves in ways of their own.
    """
    if not getattr(module, "has_gate", True):
        return False
    units = module.down_proj.shape[1 if getattr(module, "is_transposed", False) else 2]
    entered = torch.linspace(20.0, -20.0, 2 * units, dtype=module.down_proj.dtype, device=module.down_proj.device)
    gate, factor = entered.chunk(2)
    return torch.allclose(module._apply_gate(entered[None])[0], module.act_fn(gate) * factor)


def _given(arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Tensor]:
    """Return what the experts' forward was called with, by the names that all of transformers' experts use."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, arguments, strict=False)) | named
    return {name: given[name] for name in names}


def _place(module: Any, units: Int[Tensor, " unit"]) -> tuple[Tensor, Tensor]:
    """Return each neuron's expert, and its unit within the expert."""
    down: Tensor = module.down_proj
    per_expert = down.shape[1 if getattr(module, "is_transposed", False) else 2]
    units = units.to(down.device)
    return units // per_expert, units % per_expert
