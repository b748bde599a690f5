"""What is added to neurons' rows of W_out, by layer: learnt as tensors, added to what the MLPs write by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.models.experts import expert_activation
from mmray.models.interventions import by_layer
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows

Neuron = tuple[int, int]
"""Layer and unit."""


class Deltas:
    """A row of W_out's width for each of some neurons, zero to begin with."""

    def __init__(self, model: LoadedModel, neurons: Iterable[Neuron]) -> None:
        self.model = model
        self.units: dict[int, Int[Tensor, " unit"]] = {}
        self.scales: dict[int, float] = {}
        self.learnt: dict[int, list[Tensor]] = {}
        for layer, units in sorted(by_layer(model, neurons).items()):
            rows = output_rows(model.network, model.projections[layer])
            self.units[layer] = torch.tensor(units, device=rows.device)
            self.scales[layer] = float(rows.float().std())
            self.learnt[layer] = self.start(rows[self.units[layer]])

    def start(self, rows: Float[Tensor, "unit hidden"]) -> list[Tensor]:
        """Return what is learnt of a layer, given its neurons' rows of W_out."""
        return [torch.zeros_like(rows, dtype=torch.float32, requires_grad=True)]

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return what is added to the rows of a layer's neurons."""
        return self.learnt[layer][0]

    def step(self, layer: int) -> float:
        """Return the unit of a step of what is learnt of a layer: the root mean square of its W_out."""
        return self.scales[layer]

    @property
    def first(self) -> int:
        """The lowest layer that has a neuron."""
        return min(self.units)

    def written(self, layer: int, activation: Float[Tensor, "... unit"]) -> Float[Tensor, "... hidden"]:
        """Return what the edit adds to a layer's MLP output, from the activations of its neurons here."""
        return activation.float() @ self.rows(layer)

    @contextmanager
    def added(self, beyond: int = -1) -> Iterator[None]:
        """Add the rows to what the MLPs of layers above `beyond` write, at every position, while the block lasts."""
        with ExitStack() as stack:
            for layer in self.units:
                if layer > beyond:
                    module = self.model.network.get_submodule(self.model.projections[layer].path)
                    hook = partial(self._add, layer)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _add(
        self, layer: int, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor:
        if self.model.projections[layer].experts:
            activation = expert_activation(module, *arguments, **named)
        else:
            activation = arguments[0]
        return output + self.written(layer, activation[..., self.units[layer]]).to(output.dtype)


class RankOne(Deltas):
    """Rows u ⊗ v of one layer: u fixed, v learnt (as ROME, Meng et al. 2022, with the objective of `learning`)."""

    def __init__(self, model: LoadedModel, layer: int, direction: Float[Tensor, " unit"], size: float) -> None:
        self.direction = direction
        self.size = size
        super().__init__(model, [(layer, unit) for unit in range(model.widths[layer])])

    def step(self, layer: int) -> float:
        """Return the unit of a step of v: what a step of single rows adds up to at activations of norm `size`."""
        return self.scales[layer] * self.size

    def start(self, rows: Float[Tensor, "unit hidden"]) -> list[Tensor]:
        """Return v, zero to begin with."""
        return [torch.zeros(rows.shape[1], device=rows.device, requires_grad=True)]

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return u ⊗ v."""
        return torch.outer(self.direction, self.learnt[layer][0])
