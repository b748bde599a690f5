"""What each neuron does at hallucinated mentions and at true ones: mean and variance by class, merged exactly.

Moments are merged as in Chan, Golub & LeVeque 1983: no difference of large sums is taken, and the order of units
changes rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from numpy import ndarray

from mmray.features.hallucination.mentions import QUANTITIES
from mmray.runs.tables import field, vector_column, vectors

SUMS = pa.schema(
    [
        field("hallucinated", pa.bool_()),
        field("quantity", pa.string(), "; ".join(f"{name}: {text}" for name, text in QUANTITIES.items())),
        field("n", pa.int64(), "mentions"),
        field("mean", pa.large_binary(), "fp64 per neuron"),
        field("squares", pa.large_binary(), "fp64 per neuron: sum of squared deviations from the mean"),
    ]
)
"""The part that a unit commits: a row per class of mentions and quantity."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some neurons."""

    n: int
    mean: Float[ndarray, " neuron"]
    squares: Float[ndarray, " neuron"]

    @classmethod
    def of(cls, values: Float[ndarray, "mention neuron"]) -> Moments:
        """Return the moments of values; zeros without any."""
        if not len(values):
            return cls(0, np.zeros(values.shape[1]), np.zeros(values.shape[1]))
        # In two passes: a sum of squares minus the square of the sum would cancel.
        mean = values.mean(axis=0, dtype=np.float64)
        return cls(len(values), mean, np.square(values - mean).sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of mentions together."""
        n = self.n + other.n
        if not n:
            return self
        gap = other.mean - self.mean
        # With d = mean₂ − mean₁: mean = mean₁ + d·n₂/n, and squares = squares₁ + squares₂ + d²·n₁·n₂/n.
        mean = self.mean + gap * (other.n / n)
        return Moments(n, mean, self.squares + other.squares + gap**2 * (self.n * other.n / n))

    @property
    def variance(self) -> Float[ndarray, " neuron"]:
        """The unbiased variance; NaN for fewer than two mentions."""
        return self.squares / (self.n - 1) if self.n > 1 else np.full_like(self.mean, np.nan)


Key = tuple[bool, str]
"""Hallucinated or not, and the quantity."""


class ClassSums:
    """Accumulates a unit's moments, by class, quantity and layer."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = widths
        self.layers: dict[Key, list[Moments]] = {
            (hallucinated, quantity): [Moments(0, np.zeros(width), np.zeros(width)) for width in widths]
            for hallucinated in (True, False)
            for quantity in QUANTITIES
        }

    def add(
        self,
        hallucinated: Bool[ndarray, " mention"],
        layers: Iterable[Mapping[str, Float[ndarray, "mention neuron"]]],
    ) -> None:
        """Add mentions, given every quantity layer by layer."""
        # Layers come one by one, so that one layer's values are in memory at a time.
        for layer, found in enumerate(layers):
            for (kind, quantity), moments in self.layers.items():
                moments[layer] += Moments.of(found[quantity][hallucinated == kind])

    def table(self) -> pa.Table:
        """Return the unit's part."""
        keys = list(self.layers)
        columns = {
            name: np.stack([np.concatenate([getattr(one, name) for one in self.layers[key]]) for key in keys])
            for name in ("mean", "squares")
        }
        present = np.ones(len(keys), dtype=bool)
        arrays = [
            pa.array([kind for kind, _ in keys]),
            pa.array([quantity for _, quantity in keys]),
            pa.array([self.layers[key][0].n for key in keys], pa.int64()),
            *(vector_column(columns[name], present) for name in ("mean", "squares")),
        ]
        return pa.Table.from_arrays(arrays, schema=SUMS)


def merged(parts: Iterator[pa.Table]) -> dict[Key, Moments]:
    """Return the moments of all units together; at most two units are in memory at once."""
    found: dict[Key, Moments] = {}
    for part in parts:
        means, squares = (vectors(part[name], np.float64) for name in ("mean", "squares"))
        names = (part[name].to_pylist() for name in ("hallucinated", "quantity", "n"))
        for kind, quantity, n, mean, square in zip(*names, means, squares, strict=True):
            own = Moments(n, mean, square)
            found[kind, quantity] = found[kind, quantity] + own if (kind, quantity) in found else own
    return found


def effect(hallucinated: Moments, true: Moments) -> Float[ndarray, " neuron"]:
    """Return Cohen's d per neuron: the difference of means over the pooled deviation; 0 where nothing varies."""
    freedom = hallucinated.n + true.n - 2
    if hallucinated.n < 2 or true.n < 2:
        return np.zeros_like(true.mean)
    pooled = np.sqrt((hallucinated.squares + true.squares) / freedom)
    gap = hallucinated.mean - true.mean
    found: Float[ndarray, " neuron"] = np.divide(gap, pooled, out=np.zeros_like(gap), where=pooled > 0)
    return found
