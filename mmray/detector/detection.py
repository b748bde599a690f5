"""What an open-vocabulary detector makes of a vision embedding: boxes, each with a place and a logit a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class Detection(NamedTuple):
    """Boxes of each row of a batch: how much each one shows each word asked for, and where it lies.

    A logit's sigmoid is the detector's confidence. Boxes are x, y, width and height in 0..1 of what the tower sees
    (`JointModel.covers` says which part of an image that is).
    """

    logits: Float[Tensor, "row box query"]
    boxes: Float[Tensor, "row box 4"]


class Detector(nn.Module):
    """An open-vocabulary detector on top of a vision embedding; both steps are differentiable in the embedding."""

    def queries(self, words: Sequence[str]) -> Float[Tensor, "query dim"]:
        """Return what the detector looks for, a row a word."""
        raise NotImplementedError

    def forward(self, embedding: Float[Tensor, "row patch width"], queries: Float[Tensor, "query dim"]) -> Detection:
        """Return the boxes of each row's embedding, one a patch, and their logits for the queries."""
        raise NotImplementedError
