"""What an MLP's neurons read: the Linears before them, whose rows can be read and changed.

gated    activation = f(x · gate row + bias) · (x · factor row + bias)
plain    activation = f(x · row + bias)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.models.capture import nonlinearity
from mmray.models.layout import Projection
from mmray.models.linear import is_linear, is_quantised, rows_of, sizes


@dataclass(frozen=True)
class MlpInputs:
    """The Linears before the neurons of one MLP, with dense weights."""

    linears: tuple[tuple[nn.Module, int], ...]
    """One per row that a neuron has, the gate's first: the Linear, and its output that belongs to neuron 0."""
    function: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, network: PreTrainedModel, projection: Projection) -> MlpInputs | None:
        """Return the Linears before a projection's neurons.

        None for experts, quantised weights, and MLPs that are neither gated nor plain.
        """
        path, width = projection.path.rpartition(".")[0], projection.width
        mlp, output = network.get_submodule(path), network.get_submodule(projection.path)
        function = nonlinearity(mlp)
        if projection.experts or function is None:
            return None
        before = [child for child in mlp.children() if is_linear(child) and child is not output]
        if projection.gate_fused:
            gate = network.get_submodule(projection.gate or "")
            linears = [(gate, 0), (gate, width)]
        else:
            # One output per neuron tells them from routers and projections of other parts of the block.
            linears = [(child, 0) for child in before if sizes(child)[1] == width]
            if projection.gate is not None:
                gate = network.get_submodule(projection.gate)
                linears.sort(key=lambda pair: pair[0] is not gate)
        quantised = any(is_quantised(module) for module in (output, *(linear for linear, _ in linears)))
        if len(linears) != (1 if projection.gate is None else 2) or quantised:
            return None
        return cls(tuple(linears), function, network.dtype)

    @property
    def reader(self) -> nn.Module:
        """The Linear whose input is x."""
        return self.linears[0][0]

    def rows(self, units: Int[Tensor, " unit"]) -> Float[Tensor, "unit part hidden"]:
        """Return a copy of the rows of these neurons, the gate's first."""
        return torch.stack([rows_of(linear, self.dtype)[:, start + units].T for linear, start in self.linears], dim=1)

    @torch.no_grad()
    def set_rows(self, units: Int[Tensor, " unit"], rows: Float[Tensor, "unit part hidden"]) -> None:
        """Write the rows of these neurons."""
        for (linear, start), part in zip(self.linears, rows.unbind(1), strict=True):
            rows_of(linear, self.dtype)[:, start + units] = part.T.to(self.dtype)

    def biases(self, units: Int[Tensor, " unit"]) -> Float[Tensor, "unit part"]:
        """Return the biases of these neurons; zero where a Linear has none."""
        found = []
        for linear, start in self.linears:
            bias = getattr(linear, "bias", None)
            found.append(torch.zeros(len(units)) if bias is None else bias.detach()[start + units].float().cpu())
        return torch.stack(found, dim=1).to(units.device)

    def activation(
        self,
        entered: Float[Tensor, "token hidden"],
        rows: Float[Tensor, "unit part hidden"],
        biases: Float[Tensor, "unit part"],
    ) -> Float[Tensor, "token unit"]:
        """Return the activations in fp32 that neurons with these rows and biases have for inputs x."""
        gate, *factors = (
            entered.float() @ part.T.float() + bias for part, bias in zip(rows.unbind(1), biases.unbind(1), strict=True)
        )
        activation = self.function(gate)
        for factor in factors:
            activation = activation * factor
        return activation
