"""Linear layers, dense or quantised: their sizes, and their rows of weights, which can be read and changed.

A quantised layer keeps its weights in a format of its own. It is known by its sizes, which those of all libraries have
(bitsandbytes, GPTQ, AWQ, torchao, fp8, …), and read by running it: what it returns for an activation of 1 at one neuron
is this neuron's row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

DENSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
READ_ONLY = "quantised weights can't be written; --dtype bf16 (or fp16, fp32) dequantises them"
CHUNK = 1024
"""Rows of a quantised layer that are read at a time."""


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map of a token."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return sized and next(module.children(), None) is None


def sizes(module: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    # A Conv1D, GPT-2's, has other names.
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def is_dense(tensor: object) -> bool:
    """Return whether a weight is a plain tensor of numbers that can be read as they are."""
    return type(tensor) in (Tensor, nn.Parameter) and isinstance(tensor, Tensor) and tensor.dtype in DENSE


def is_quantised(module: nn.Module) -> bool:
    """Return whether a linear layer keeps its weights in another format than as a matrix of numbers."""
    return not is_dense(getattr(module, "weight", None))


def rows_of(module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "input output"]:
    """Return the rows of a linear layer: a view of dense weights, a new tensor in `dtype` of quantised ones."""
    if not is_quantised(module):
        weight: Tensor = module.get_parameter("weight")
        # A Conv1D keeps the transpose of what a Linear does.
        return weight if isinstance(module, Conv1D) else weight.T
    rows = _read(module, dtype)
    for units, added in _ADDED.get(module, {}).values():
        rows[units.to(rows.device)] += added.to(rows)
    return rows


@torch.no_grad()
def _read(module: Any, dtype: torch.dtype) -> Float[Tensor, "input output"]:
    device = next(chain(module.parameters(), module.buffers())).device
    count, bias = sizes(module)[0], getattr(module, "bias", None)
    parts = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        ones = torch.zeros(size, count, dtype=dtype, device=device)
        ones[torch.arange(size), start + torch.arange(size)] = 1
        # Not by calling the module: its hooks are there for the network's own activations.
        parts.append(module.forward(ones))
    rows = torch.cat(parts)
    return rows if bias is None else rows - bias


@contextmanager
def added_to_rows(
    module: nn.Module, units: Int[Tensor, " unit"], added: Float[Tensor, "unit output"]
) -> Iterator[None]:
    """Let a quantised layer write as if this had been added to rows; `rows_of` returns the sum.

    The weights stay as they are.
    """

    def add(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        chosen = arguments[0][..., units.to(output.device)].float()
        write: Tensor = chosen @ added.to(chosen)
        return output + write.to(output)

    key, active = object(), _ADDED.setdefault(module, {})
    active[key] = units, added
    try:
        with module.register_forward_hook(add):
            yield
    finally:
        del active[key]


_ADDED: WeakKeyDictionary[nn.Module, dict[object, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def has_quantised(network: nn.Module) -> bool:
    """Return whether any linear layer of a network is quantised."""
    return any(is_linear(module) and is_quantised(module) for module in network.modules())


def dequantise(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace all quantised layers of a network by dense ones, and forget that it was quantised."""
    # What the kernels take, which may be another than was asked for.
    settled = network.dtype
    for path, module in list(network.named_modules()):
        if is_linear(module) and is_quantised(module):
            rows, bias = rows_of(module, settled), getattr(module, "bias", None)
            dense = nn.Linear(*sizes(module), bias is not None, rows.device, settled).requires_grad_(False)
            dense.weight.data = rows.T.contiguous()
            if bias is not None:
                dense.bias.data = bias.data.to(settled)
            network.set_submodule(path, dense)
    quantiser: Any = getattr(network, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(network)
    if settled != dtype:
        network.to(dtype)
