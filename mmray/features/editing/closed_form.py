"""Edits in closed form: neurons' rows of W_out zeroed, scaled, made blind to a word, or disturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.editing.settings import EditSettings


@dataclass(frozen=True)
class Row:
    """What a closed form sees of one layer's neurons."""

    rows: Float[Tensor, "unit hidden"]
    word: Float[Tensor, "token hidden"]
    """The unembeddings of the word's tokens."""
    settings: EditSettings
    generator: torch.Generator


def zero(given: Row) -> Float[Tensor, "unit hidden"]:
    """Return what leaves the neurons nothing to write."""
    return -given.rows


def scale(given: Row) -> Float[Tensor, "unit hidden"]:
    """Return what multiplies what the neurons write by `factor`."""
    return (given.settings.factor - 1.0) * given.rows


def project(given: Row) -> Float[Tensor, "unit hidden"]:
    """Return what takes from the rows all that raises or lowers the word's tokens: their part in the span of the
    tokens' unembeddings.
    """
    basis: Tensor = torch.linalg.qr(given.word.T)[0]
    return -(given.rows @ basis) @ basis.T


def noise(given: Row) -> Float[Tensor, "unit hidden"]:
    """Return independent Gaussian noise of deviation `sigma`, the published perturbation (Pan et al. 2024)."""
    drawn = torch.randn(given.rows.shape, generator=given.generator)
    return given.settings.sigma * drawn.to(given.rows.device)


CLOSED: dict[str, Callable[[Row], Float[Tensor, "unit hidden"]]] = {
    "zero": zero,
    "scale": scale,
    "project": project,
    "noise": noise,
}
"""The closed forms by the name that `--method` takes."""
