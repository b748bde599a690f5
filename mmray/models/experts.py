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
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), arguments, strict=False)) | named
        receive(expert_activation(module, given["hidden_states"], given["top_k_index"], given["top_k_weights"]))

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def expert_activation(
    module: Any,
    hidden: Float[Tensor, "token hidden"],
    chosen: Int[Tensor, "token choice"],
    weights: Float[Tensor, "token choice"],
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
    hidden, chosen, weights = (given.to(down.device) for given in (hidden, chosen, weights))
    activation = hidden.new_zeros(hidden.shape[0], experts, units)
    # Expert-parallel models mark a choice that lives elsewhere by an id past the last expert: no expert takes it.
    for expert in torch.unique(chosen[chosen < experts]).tolist():
        token, choice = torch.where(chosen == expert)
        matrix = entry[expert].T if transposed else entry[expert]
        entered = functional.linear(hidden[token], matrix, None if bias is None else bias[expert])
        opened = module._apply_gate(entered) if has_gate else module.act_fn(entered)
        activation[token, expert] = opened * weights[token, choice, None].to(opened.dtype)
    return activation.flatten(1)
