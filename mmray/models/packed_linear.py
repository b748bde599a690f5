"""Linear layers on a CPU with weights packed for oneDNN.

A step of generation multiplies few rows by large matrices. PyTorch leaves products in fp32 to MKL, which is slow at
that on processors that are not Intel's. With 128 rows and an unembedding of 49,152 tokens, two cores of an AMD EPYC
take 1.7 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mmray.models.linear import is_dense

LARGEST = 4 << 30
"""Bytes of weights that are packed: the packed copy takes as much memory again."""
ROWS = 128
"""Rows of a product that the weights are packed for. Others are as exact, and hardly slower."""


@contextmanager
def packed_linears(network: nn.Module) -> Iterator[None]:
    """Let a network's linear layers multiply by packed copies of their weights inside the `with` block.

    Of effect in fp32 on an x86 CPU, for networks of up to `LARGEST` bytes. Products differ by rounding. Weights must
    not change inside the block.
    """
    linears = [module for module in network.modules() if isinstance(module, nn.Linear) and _can_be_packed(module)]
    with ExitStack() as stack:
        if sum(linear.weight.nbytes for linear in linears) <= LARGEST:
            for linear in linears:
                # Instead of its class's: hooks are called as before.
                vars(linear)["forward"] = _packed(linear)
                stack.callback(vars(linear).pop, "forward")
        yield


def _can_be_packed(linear: nn.Linear) -> bool:
    # Not subclasses, and not modules whose forward a library has replaced: what they compute is their own.
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    # torchao's quantised weights say that they are fp32.
    plain = is_dense(linear.weight) and linear.weight.dtype == torch.float32
    return both and plain and linear.weight.device.type == "cpu"


@torch.no_grad()
def _packed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(states: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (states.requires_grad or linear.weight.requires_grad):
            return nn.Linear.forward(linear, states)  # the packed product has no gradient
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, linear.bias, "none", [], "")
        return found

    return forward
