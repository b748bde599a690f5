"""Choose each label's neurons by contrast: their contribution to its tokens compared with that to other labels'."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mmray.features.selectivity.lape import Chosen


def contrasts(contribution: Float[Tensor, "neuron label"]) -> Float64[Tensor, "neuron label"]:
    """Return each neuron's mean contribution to a label's tokens, minus the largest magnitude of any other label's.

    It is the largest, not the mean, so that a neuron that serves two of four labels equally belongs to neither.
    """
    contribution = contribution.double()
    found = torch.empty_like(contribution)
    for label in range(contribution.shape[1]):
        # Magnitudes of either sign: a neuron that suppresses another label's tokens is not specific to this one.
        others = torch.cat([contribution[:, :label], contribution[:, label + 1 :]], dim=1)
        found[:, label] = contribution[:, label] - others.abs().amax(dim=1)
    return found


def choose(contribution: Float[Tensor, "neuron label"], rate: float) -> Chosen:
    """Return, for each label, the round(rate · neurons) with the highest contrast, if it is above zero.

    They are in order of their highest contrast. A neuron has one label, because its contrast is positive for one only.
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
