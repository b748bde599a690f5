"""Saliency maps: how much each part of the image supports one output token, and how methods draw that.

`alignment` is the gradient alignment of Giulivi & Boracchi (2024). It weighs a box by the cosine of two gradients with
respect to the vision embedding: of the word's logit, and of the box's own logit for the word. The other methods are
baselines. A map has SIDE × SIDE points over what the model sees, in the method's own unit. `min_max` of
`mmray.neurons.heatmaps` makes maps comparable, but hides whether anything was aligned at all.

Two choices differ from the released code. A word is explained at its first token, not its last. OWL-ViT's CLS is left
out of both gradients, because the language model never sees it; this changes the size of the cosines and hardly their
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.detector.boxes import centres_inside
from mmray.neurons.heatmaps import SIDE, upsample

Raster = Float[Tensor, "point point"]


class Saliency(NamedTuple):
    """A map. Methods that weigh boxes add the boxes and their weights (cosines, confidences)."""

    values: Raster
    weights: Float[Tensor, " box"] | None = None
    boxes: Float[Tensor, "box 4"] | None = None


def cosines(gradient: Float[Tensor, "patch width"], others: Float[Tensor, "box patch width"]) -> Float[Tensor, " box"]:
    """Return the cosine of a gradient with each of the others, over all entries; 0 where one of them is 0."""
    one, many = gradient.flatten(), others.flatten(1)
    # Not functional.cosine_similarity: it clamps at 1e-8, and gradients are often smaller.
    found: Tensor = (many @ one) / (many.norm(dim=1) * one.norm()).clamp(min=1e-20)
    return found


def paint(boxes: Float[Tensor, "box 4"], weights: Float[Tensor, " box"], side: int = SIDE) -> Raster:
    """Return at side × side points the highest weight of the boxes that cover each; the lowest where none does."""
    inside = centres_inside(boxes[None], side)[0]
    covered = torch.where(inside, weights[:, None], -torch.inf).max(dim=0).values
    # Not 0 where no box is: if all cosines were negative, 0 would be the map's highest value.
    return torch.where(covered.isinf(), weights.min(), covered).reshape(side, side)


def spread(patches: Float[Tensor, " patch"], rows: int) -> Raster:
    """Return a value per patch as a map, bilinear between the patch centres."""
    return upsample(patches.reshape(rows, -1), SIDE, SIDE)


def rollout(attentions: Sequence[Float[Tensor, "head query key"]]) -> Float[Tensor, "query key"]:
    """Return attention rolled out over the layers (Abnar & Zuidema 2020).

    Half of each block's output counts as its input, for the residual connection.
    """
    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        # Layers may lie on different GPUs.
        mean = attention.float().mean(dim=0).to(total.device)
        mixed = mean + torch.eye(len(mean), device=mean.device)
        total = (mixed / mixed.sum(dim=1, keepdim=True)) @ total
    return total
