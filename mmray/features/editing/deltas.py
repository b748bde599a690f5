"""Changes of neurons' rows of W_out, by layer: learned as tensors, and applied by hooks on the MLP outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.models.experts import Experts
from mmray.models.interventions import by_layer
from mmray.models.loading import LoadedModel
from mmray.models.parts import output_rows

Neuron = tuple[int, int]
"""Layer and unit."""


class Deltas:
    """One change of a row of W_out per neuron, zero to begin with.

    The MLP output then changes by Δᵀa, where a are the activations of these neurons.
    """

    def __init__(self, model: LoadedModel, neurons: Iterable[Neuron]) -> None:
        self.model = model
        self.units: dict[int, Int[Tensor, " unit"]] = {}
        self.scales: dict[int, float] = {}
        """Standard deviation of each layer's W_out."""
        self.parameters: dict[int, list[Tensor]] = {}
        self.shapes: dict[int, tuple[Float[Tensor, "unit unit"], Float[Tensor, "hidden hidden"]]] = {}
        """Per layer, what the parameters are multiplied by, from the left and from the right; see `whitening`."""
        self.whitened = False
        """Whether ½‖parameters‖² is what the edit costs kept answers, in nats per token."""
        for layer, units in sorted(by_layer(model, neurons).items()):
            rows = output_rows(model.network, model.projections[layer])
            self.units[layer] = torch.tensor(units, device=rows.device)
            self.scales[layer] = float(rows.float().std())
            self.parameters[layer] = self.initial(rows[self.units[layer]])

    def initial(self, rows: Float[Tensor, "unit hidden"]) -> list[Tensor]:
        """Return the parameters of a layer before learning, given its neurons' rows of W_out."""
        # fp32 whatever the model's format: small steps would round away in half precision.
        return [torch.zeros_like(rows, dtype=torch.float32, requires_grad=True)]

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return what is added to the rows of a layer's neurons."""
        if layer not in self.shapes:
            return self.parameters[layer][0]
        left, right = self.shapes[layer]
        return left @ self.parameters[layer][0] @ right

    def shaped(
        self, layer: int, activation: Float[Tensor, "... unit"], entered: Float[Tensor, "... hidden"] | None
    ) -> Float[Tensor, "... unit"]:
        """Return activations times the layer's left shape, which learning then need not multiply at every step.

        `entered` is what the neurons read.
        """
        return activation.float() @ self.shapes[layer][0] if layer in self.shapes else activation

    def size(self) -> Float[Tensor, ""]:
        """Return Σ ‖row‖² over the mean ‖W_out row‖² of its layer; if whitened, the cost for kept answers."""
        if self.whitened:
            parts = [parameters.square().sum() / 2 for (parameters,) in self.parameters.values()]
        else:
            parts = [
                rows.square().sum() / (self.scales[layer] ** 2 * rows.shape[1])
                for layer in self.units
                for rows in (self.rows(layer),)
            ]
        # Layers may be on several devices.
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    @property
    def inputs(self) -> Float[Tensor, "unit part hidden"] | None:
        """What is added to the rows that the neurons read, in the order of `units`; None: they stay."""
        return None

    @property
    def first(self) -> int:
        """The lowest edited layer."""
        return min(self.units)

    def output(
        self,
        layer: int,
        activation: Float[Tensor, "... unit"],
        entered: Float[Tensor, "... hidden"] | None = None,
        *,
        shaped: bool = False,
    ) -> Float[Tensor, "... hidden"]:
        """Return what the edit adds to a layer's MLP output, given its neurons' activations, or `shaped` ones."""
        if shaped and layer in self.shapes:
            return activation @ self.parameters[layer][0] @ self.shapes[layer][1]
        return activation.float() @ self.rows(layer)

    @contextmanager
    def added(self, above: int = -1) -> Iterator[None]:
        """Add the edit to the MLP outputs of layers above `above`, at every position, inside the block."""
        with ExitStack() as stack:
            for layer in self.units:
                if layer > above:
                    stack.enter_context(self._added_to(layer))
            yield

    def _added_to(self, layer: int) -> AbstractContextManager[Any]:
        network, projection = self.model.network, self.model.projections[layer]

        def write(activation: Float[Tensor, "... neuron"]) -> Float[Tensor, "... hidden"]:
            return self.output(layer, activation[..., self.units[layer]])

        def add(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + write(arguments[0]).to(output.dtype)

        if projection.experts:
            return Experts.of(network, projection).added(write)
        handle: AbstractContextManager[Any] = network.get_submodule(projection.path).register_forward_hook(add)
        return handle


class RankOne(Deltas):
    """The change u ⊗ v of all rows of one layer: u is fixed and v learned, as in ROME (Meng et al. 2022).

    v is learned with the objective of `mmray.features.editing.training`, not ROME's.
    """

    def __init__(self, model: LoadedModel, layer: int, direction: Float[Tensor, " unit"]) -> None:
        self.direction = direction
        super().__init__(model, [(layer, unit) for unit in range(model.widths[layer])])

    def initial(self, rows: Float[Tensor, "unit hidden"]) -> list[Tensor]:
        """Return v, zero to begin with."""
        return [torch.zeros(rows.shape[1], device=rows.device, requires_grad=True)]

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return u ⊗ v."""
        return torch.outer(self.direction, self.parameters[layer][0])
