"""What some models have between the final norm and the unembedding: a Linear, an activation function, and another norm.

BERT's head is such a transform. Its activation function is not linear, so a neuron's share of a logit depends on the
state: in f(z) = z · f(z)/z the second factor, the gate, is fixed at its value there, as a norm's scale is. With gates
and scales fixed, shares of all that is written add up to the logit.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.models.capture import capture_input
from mmray.models.linear import is_linear, rows_of


class Transform:
    """A transform, and its parts."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.dense = next(part for part in module.modules() if is_linear(part))
        self.norm = next(part for part in module.modules() if not is_linear(part) and hasattr(part, "weight"))

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "input output"]:
        """Return the Linear's weights."""
        return rows_of(self.dense, dtype)

    def gates(
        self, normed: Float[Tensor, "position hidden"]
    ) -> tuple[Float[Tensor, "position hidden"], Float[Tensor, "position hidden"]]:
        """Return the gates for the final norm's output at each position, and the inputs of the transform's own norm."""
        before: list[Tensor] = []
        after: list[Tensor] = []
        with ExitStack() as stack:
            stack.callback(self.dense.register_forward_hook(lambda _, __, output: before.append(output)).remove)
            stack.enter_context(capture_input(self.norm, after.append))
            self.module(normed)
        z, passed = before[0].float(), after[0].float()
        return torch.where(z == 0, 0, passed / z), passed
