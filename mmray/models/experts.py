"""Read the neurons of fused experts, which no Linear's input shows: recomputed from what the experts were given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def routed_activation(module: nn.Module, receive: Callable[[Float[Tensor, "token neuron"]], None]) -> Iterator[None]:
    """Hand over the experts' activations at each forward, tokens batch by batch as the experts themselves see them.

    The forward is not touched, whichever of transformers' implementations (eager, batched, grouped) computes it.
    """

    def see(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], __: Tensor) -> None:
        receive(expert_activation(module, **_given(arguments, named)))

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed_routed_activation(
    module: nn.Module, units: Int[Tensor, " unit"], change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let the experts write what they would write if `change` had been applied to these neurons' activations.

    `change` takes and gives activations (token, unit), with the routing weight in them; it sees zeros where a token
    is not routed to the neuron's expert, and what it makes of them is written too.
    """

    def rewrite(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        given = _given(arguments, named)
        index = units.to(given["hidden_states"].device)
        before = expert_activation(module, **given)[:, index]
        return output + (change(before) - before) @ expert_rows(module, index)

    handle = module.register_forward_hook(rewrite, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
    module: Any,
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
    down = module.down_proj
    transposed = getattr(module, "is_transposed", False)
    experts, units = down.shape[0], down.shape[1 if transposed else 2]
    has_gate = getattr(module, "has_gate", True)
    entry = module.gate_up_proj if has_gate else module.up_proj
    bias = getattr(module, "gate_up_proj_bias" if has_gate else "up_proj_bias", None)
    hidden, chosen, weights = (given.to(down.device) for given in (hidden_states, top_k_index, top_k_weights))
    activation = hidden.new_zeros(hidden.shape[0], experts, units)
    # Expert-parallel models mark a choice that lives elsewhere by an id past the last expert: no expert takes it.
    for expert in torch.unique(chosen[chosen < experts]).tolist():
        token, choice = torch.where(chosen == expert)
        matrix = entry[expert].T if transposed else entry[expert]
        entered = functional.linear(hidden[token], matrix, None if bias is None else bias[expert])
        opened = module._apply_gate(entered) if has_gate else module.act_fn(entered)
        activation[token, expert] = opened * weights[token, choice, None].to(opened.dtype)
    return activation.flatten(1)


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
