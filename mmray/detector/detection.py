"""The interface of an open-vocabulary detector: from a vision embedding to boxes with a logit per word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from mmray.errors import InputError


class Detection(NamedTuple):
    """Boxes of each row of a batch, with a logit per query.

    A logit's sigmoid is the detector's confidence. Boxes are x, y, width and height in 0..1 of what the tower sees;
    `VisionTower.covers` says which part of the image that is.
    """

    logits: Float[Tensor, "row box query"]
    boxes: Float[Tensor, "row box 4"]


class Detector(nn.Module):
    """An open-vocabulary detector on top of a vision embedding, differentiable in the embedding."""

    def queries(self, words: Sequence[str]) -> Float[Tensor, "query dim"]:
        """Return the query vector of each word."""
        raise NotImplementedError

    def forward(self, embedding: Float[Tensor, "row patch width"], queries: Float[Tensor, "query dim"]) -> Detection:
        """Return one box per patch, and the boxes' logits for the queries."""
        raise NotImplementedError


def check_words(words: Sequence[str]) -> None:
    """Raise InputError for an empty word, or for no words at all."""
    if not words or not all(word.strip() for word in words):
        raise InputError("the detector was given an empty word, or none; name what it should look for")
