"""Contributions to the tokens of each label → the neurons whose share in its tokens stands out against the others'."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mmray.features.selectivity.lape import Chosen


def contrasts(contribution: Float[Tensor, "neuron label"]) -> Float64[Tensor, "neuron label"]:
    """Return a neuron's mean contribution to a label's tokens less the largest, of either sign, to another label's.

    The largest and not the mean: a neuron that serves two of four labels alike is neither's.
    """
    contribution = contribution.double()
    found = torch.empty_like(contribution)
    for label in range(contribution.shape[1]):
        others = torch.cat([contribution[:, :label], contribution[:, label + 1 :]], dim=1)
        found[:, label] = contribution[:, label] - others.abs().amax(dim=1)
    return found


def choose(contribution: Float[Tensor, "neuron label"], rate: float) -> Chosen:
    """Return, of each label, the round(rate · neurons) of highest contrast, as far as it is above zero.

    They come in the order of their highest contrast; a neuron has one label, for a contrast is above zero for one only.
    """
    contrast = contrasts(contribution)
    count = round(len(contrast) * rate)
    member = torch.zeros(contrast.shape, dtype=torch.bool)
    for label, column in enumerate(contrast.unbind(1)):
        best = column.sort(descending=True, stable=True)
        member[best.indices[:count][best.values[:count] > 0], label] = True
    order = contrast.amax(dim=1).argsort(descending=True, stable=True)
    kept = order[member[order].any(dim=1)]
    return Chosen(kept, member[kept], contrast[kept].amax(dim=1))
