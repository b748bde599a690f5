"""Insertion and deletion curves (Petsiuk et al. 2018) over a model's visual features.

A patch is erased by the mean of the image's patches, in the features: erased pixels would have to be blurred, and a
tower sees the blur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.features.saliency.measures import STEPS
from mmray.features.saliency.saliency_input import SaliencyInput
from mmray.neurons.token_positions import rank_in_row

Ends: TypeAlias = tuple[Float[Tensor, " target"], Float[Tensor, " target"]]
"""The probability of each target's token with the whole image, and with all patches erased."""


def erasure_ends(given: SaliencyInput) -> Ends:
    """Return both ends of the curves, which are the same for every order of patches."""
    erased = given.features.clone()
    for row in {target.row for target in given.targets}:
        erased[row, given.grid(row).positions] = given.patches(given.features, row).mean(dim=0)
    return given.probabilities(given.features, given.targets).cpu(), given.probabilities(erased, given.targets).cpu()


def erasure_curves(
    given: SaliencyInput, orders: Sequence[Int[Tensor, " patch"]], ends: Ends, steps: int = STEPS
) -> tuple[Float[Tensor, "target step"], Float[Tensor, "target step"]]:
    """Return the probability of each target's token as patches are erased, and as they are put back.

    `orders` are the targets' patches, first ones first. Curves have steps + 1 points, ends included.
    """
    whole, nothing = ends
    deletion, insertion = whole[:, None].repeat(1, steps + 1), nothing[:, None].repeat(1, steps + 1)
    deletion[:, -1], insertion[:, -1] = nothing, whole
    ranks = rank_in_row(given.targets)
    # Targets of different rows share a forward pass; those of one row need different erasures.
    for rank in sorted(set(ranks)):
        members = [index for index, own in enumerate(ranks) if own == rank]
        # Both ends of the curves are given.
        for step in range(1, steps):
            for curve, inserting in ((deletion, False), (insertion, True)):
                features = given.features.clone()
                for index in members:
                    row = given.targets[index].row
                    patches = torch.tensor(given.grid(row).positions)
                    # Always the same steps as a fraction of patches, for grids of any size.
                    count = round(step / steps * len(patches))
                    erased = orders[index][count:] if inserting else orders[index][:count]
                    features[row, patches[erased.cpu()]] = given.patches(given.features, row).mean(dim=0)
                curve[members, step] = given.probabilities(features, [given.targets[index] for index in members]).cpu()
    return deletion, insertion
