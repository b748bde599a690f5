"""Baselines of edits: other neurons, a whole MLP, a rank-one change, and LoRA; and the tokens of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.errors import InputError
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas, Neuron, RankOne
from mmray.features.editing.divergence import divergence, highest
from mmray.features.editing.resumed_forward import resume_all
from mmray.models.loading import LoadedModel

# The default of peft's LoraConfig.
LORA_RANK = 8
RIDGE = 1e-2
"""Added to the covariance's diagonal, in units of its mean: with few positions the covariance is singular."""


def whole_layers(model: LoadedModel, layers: Sequence[int]) -> list[Neuron]:
    """Return every neuron of these layers. Learning all of the last layer's is FT-L (Meng et al. 2022)."""
    return [(layer, unit) for layer in layers for unit in range(model.widths[layer])]


def most_active(model: LoadedModel, new: Sequence[Example], count: int, layers: Sequence[int]) -> list[Neuron]:
    """Return the neurons most active where the model predicts the old word, the paper's baseline."""
    return highest({layer: divergence(model, new, layer).mean(dim=0) for layer in layers}, count)


@torch.no_grad()
def rank_one(model: LoadedModel, new: Sequence[Example], keep: Sequence[Example], layer: int) -> RankOne:
    """Return a rank-one change of one layer as in ROME: u = C⁻¹k / kᵀC⁻¹k, and v to be learned.

    k is the mean activation where the model predicts the old word, and C the second moment of activations along the
    kept answers. The MLP output at k then changes by v, and as little as possible elsewhere. Raises InputError if there
    are no kept answers.
    """
    if not keep:
        raise InputError("rank-one needs captions that must stay; raise --kept, or analyse more samples")
    key = divergence(model, new, layer).mean(dim=0)
    # Nothing is learned with these: they only say whose activations a resumed forward keeps.
    all_units = Deltas(model, whole_layers(model, [layer]))
    others = torch.cat([part.activation.flatten(0, -2) for part, _ in resume_all(model, keep, all_units)])
    moment = others.T @ others / len(others)
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(key), device=key.device)
    # Solved for one vector: forming C⁻¹ costs more, and loses digits where C is nearly singular.
    direction = torch.linalg.solve(moment + ridge, key)
    return RankOne(model, layer, direction / (key @ direction))


class LowRank(Deltas):
    """A peft LoRA (Hu et al. 2022) on a layer's output projection; `close` removes it from the network."""

    def __init__(self, model: LoadedModel, layer: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError("--method lora needs peft: pip install 'mmray[baselines]'") from error
        path = model.projections[layer].path
        if model.projections[layer].experts:
            raise InputError(f"{model.name}: --method lora needs a Linear, which fused experts are not")
        super().__init__(model, whole_layers(model, [layer]))
        self.path = path
        self.plain = model.network.get_submodule(path)
        # alpha = r makes peft's factor alpha / r equal to 1, so that `rows` is B·A alone.
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=[path])
        # peft starts B at 0, so the one forward that learning resumes from still has the plain projection's output.
        inject_adapter_in_model(config, model.network)
        adapted: Any = model.network.get_submodule(path)
        a, b = (getattr(adapted, name)["default"].weight for name in ("lora_A", "lora_B"))
        self.parameters[layer] = [a.requires_grad_(), b.requires_grad_()]

    def rows(self, layer: int) -> Float[Tensor, "unit hidden"]:
        """Return what the adapter adds to W_out's rows."""
        a, b = self.parameters[layer]
        # peft makes the adapter in the layer's number format, which may be half precision.
        return (b.float() @ a.float()).T

    def close(self) -> None:
        """Put the plain projection back."""
        parent, _, name = self.path.rpartition(".")
        setattr(self.model.network.get_submodule(parent), name, self.plain)
