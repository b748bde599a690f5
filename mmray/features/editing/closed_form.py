"""Closed-form edits: set neurons' rows of W_out to zero, scale them, make them blind to a word, or add noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.editing.settings import EditSettings


@dataclass(frozen=True)
class LayerRows:
    """One layer's located rows of W_out, and what a closed form may use. It returns the change of the rows."""

    rows: Float[Tensor, "unit hidden"]
    word: Float[Tensor, "token hidden"]
    """The unembeddings of the word's tokens."""
    settings: EditSettings
    generator: torch.Generator


def zero(layer: LayerRows) -> Float[Tensor, "unit hidden"]:
    """Return the change that sets the rows to zero."""
    return -layer.rows


def scale(layer: LayerRows) -> Float[Tensor, "unit hidden"]:
    """Return the change that multiplies the rows by `factor`."""
    return (layer.settings.factor - 1.0) * layer.rows


def project(layer: LayerRows) -> Float[Tensor, "unit hidden"]:
    """Return the change that removes the rows' part in the span of the tokens' unembeddings.

    The edited neurons then neither raise nor lower the logits of the word's tokens.
    """
    # Orthonormal, because the unembeddings of a word's tokens are not orthogonal to each other.
    basis: Tensor = torch.linalg.qr(layer.word.T)[0]
    return -(layer.rows @ basis) @ basis.T


def noise(layer: LayerRows) -> Float[Tensor, "unit hidden"]:
    """Return independent Gaussian noise of deviation `sigma`, the published perturbation (Pan et al. 2024)."""
    # Drawn on the CPU, where the generator lives, so that every device gets the same noise.
    drawn = torch.randn(layer.rows.shape, generator=layer.generator)
    return layer.settings.sigma * drawn.to(layer.rows.device)
