"""Where a word comes from: for one output token, how much each part of the image speaks for it, by several methods.

`alignment` is the gradient alignment of Giulivi & Boracchi (2024): a box matters as far as the gradient of the word's
logit in the embedding points where the gradient of the box's own logit for the word points. The others are its rivals.
Maps are over a raster of SIDE × SIDE points of what the model sees, in the method's own unit: `min_max` of
`mmray.neurons.heatmaps` makes them comparable, and forgets whether anything was aligned at all.

Two choices differ from the released code: a word is explained at its first token (theirs: its last), and OWL-ViT's CLS
is left out of both gradients' norms, which changes the cosines' size and hardly their order.
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
    """A map, and for methods that weigh boxes the boxes with their weights (cosines, confidences)."""

    values: Raster
    weights: Float[Tensor, " box"] | None = None
    boxes: Float[Tensor, "box 4"] | None = None


def cosines(gradient: Float[Tensor, "patch width"], others: Float[Tensor, "box patch width"]) -> Float[Tensor, " box"]:
    """Return the cosine of a gradient with each of others, over all their entries; 0 where one of them is 0."""
    flat, against = gradient.flatten(), others.flatten(1)
    found: Tensor = (against @ flat) / (against.norm(dim=1) * flat.norm()).clamp(min=1e-20)
    return found


def paint(boxes: Float[Tensor, "box 4"], weights: Float[Tensor, " box"]) -> Raster:
    """Return at each point the highest weight of the boxes that cover it; the lowest weight where none does."""
    inside = centres_inside(boxes[None], SIDE)[0]
    covered = torch.where(inside, weights[:, None], -torch.inf).max(dim=0).values
    return torch.where(covered.isinf(), weights.min(), covered).reshape(SIDE, SIDE)


def spread(patches: Float[Tensor, " patch"], rows: int) -> Raster:
    """Return a value a patch as a map, bilinear between the patches' centres."""
    return upsample(patches.reshape(rows, -1), SIDE, SIDE)


def gradient_norm(
    gradient: Float[Tensor, "patch width"], seen: Float[Tensor, "patch width"]
) -> Float[Tensor, " patch"]:
    """Return the length of the gradient at each patch."""
    lengths: Tensor = gradient.norm(dim=1)
    return lengths


def gradient_input(
    gradient: Float[Tensor, "patch width"], seen: Float[Tensor, "patch width"]
) -> Float[Tensor, " patch"]:
    """Return gradient × input, summed over each patch: what its own scale adds to the logit, to first order."""
    products: Tensor = (gradient * seen).sum(dim=1)
    return products


def rollout(attentions: Sequence[Float[Tensor, "head query key"]]) -> Float[Tensor, "query key"]:
    """Return attention rolled out over the layers, half of each block's output its input (Abnar & Zuidema 2020)."""
    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        mean = attention.float().mean(dim=0).to(total.device)
        mixed = mean + torch.eye(len(mean), device=mean.device)
        total = (mixed / mixed.sum(dim=1, keepdim=True)) @ total
    return total
