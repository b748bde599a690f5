"""Insertion and deletion (Petsiuk et al. 2018) on what the model sees: its word without patches, or with them alone.

A patch is taken away by putting the mean of the image's patches in its place, in the embedding itself: pixels would
have to be blurred, and a tower sees the blur.
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

Ends: TypeAlias = tuple[Float[Tensor, " place"], Float[Tensor, " place"]]
"""The probability of each place's token with the whole image, and with nothing of it."""


def erasure_ends(look: SaliencyInput) -> Ends:
    """Return where every curve begins and ends, whatever the order."""
    bare = look.seen.clone()
    for row in {place.row for place in look.places}:
        bare[row, look.grid(row).positions] = look.patches(look.seen, row).mean(dim=0)
    return look.probabilities(look.seen, look.places).cpu(), look.probabilities(bare, look.places).cpu()


def erasure_curves(
    look: SaliencyInput, orders: Sequence[Int[Tensor, " patch"]], ends: Ends, steps: int = STEPS
) -> tuple[Float[Tensor, "place step"], Float[Tensor, "place step"]]:
    """Return the probability of each place's token as patches go, and as they come back, in the places' orders.

    The curves have steps + 1 points: of the first, the whole image comes first and nothing of it last. Places of
    different rows share a forward.
    """
    whole, nothing = ends
    deletion, insertion = whole[:, None].repeat(1, steps + 1), nothing[:, None].repeat(1, steps + 1)
    deletion[:, -1], insertion[:, -1] = nothing, whole
    turns = rank_in_row(look.places)
    for turn in sorted(set(turns)):
        members = [number for number, own in enumerate(turns) if own == turn]
        for step in range(1, steps):
            for curve, kept_first in ((deletion, False), (insertion, True)):
                seen = look.seen.clone()
                for number in members:
                    row = look.places[number].row
                    patches = torch.tensor(look.grid(row).positions)
                    count = round(step / steps * len(patches))
                    gone = orders[number][count:] if kept_first else orders[number][:count]
                    seen[row, patches[gone.cpu()]] = look.patches(look.seen, row).mean(dim=0)
                curve[members, step] = look.probabilities(seen, [look.places[number] for number in members]).cpu()
    return deletion, insertion
