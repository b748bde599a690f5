"""From sums of samples to measures: the value of the totals, and a bootstrap interval over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

INTERVAL = (2.5, 97.5)
"""Percentiles between which 95 % of the draws lie."""
WEIGHTS_AT_ONCE = 2**24
"""Numbers of draws × samples that are held at once."""

Value = Callable[[Float[ndarray, "draw sum"]], Float[ndarray, " draw"]]
"""From totals to the value of a measure; NaN where they give none."""


@dataclass(frozen=True)
class Measured:
    """A measure before and after an edit, the interval of that after, and of how many samples; None: no such sample."""

    before: float | None
    after: float | None
    low: float | None
    high: float | None
    n: int


def ratio(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return what was counted, of how many."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Float[ndarray, " draw"] = totals[:, 0] / totals[:, 1]
    return np.where(totals[:, 1] > 0, share, np.nan)


def measure(
    before: Float[ndarray, "sample sum"],
    after: Float[ndarray, "sample sum"],
    value: Value = ratio,
    draws: int = 1000,
    seed: int = 0,
) -> Measured:
    """Return a measure of these samples, one at least, which stand in an order of their own.

    The interval is that of the percentile bootstrap: samples are drawn with replacement, their sums totalled. Draws
    that give no value (none of what is counted was drawn) are left out.
    """
    values = np.concatenate([value(totals) for totals in _resampled(after, draws, np.random.default_rng(seed))])
    found = values[np.isfinite(values)]
    low, high = np.percentile(found, INTERVAL) if len(found) else (np.nan, np.nan)
    return Measured(
        before=_known(value(before.sum(axis=0)[None])[0]),
        after=_known(value(after.sum(axis=0)[None])[0]),
        low=_known(low),
        high=_known(high),
        n=len(after),
    )


def by_measure(measurements: pa.Table) -> dict[str, tuple[Float[ndarray, "sample sum"], Float[ndarray, "sample sum"]]]:
    """Return measure → the sums of its samples before and after, samples in order of their identifiers.

    However the rows were cut and put together, the result is the same.
    """
    grouped: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for row in measurements.to_pylist():
        parts = grouped.setdefault(row["measure"], {}).setdefault(row["sample_id"], [])
        parts.append((row["before"], row["after"]))
    return {
        name: (_sums(samples, 0), _sums(samples, 1)) for name, samples in sorted(grouped.items(), key=lambda g: g[0])
    }


def _sums(samples: Mapping[str, list[tuple[list[float], list[float]]]], side: int) -> Float[ndarray, "sample sum"]:
    # Sorted, for the order in which numbers are added changes their sum's last bits.
    return np.array([np.sum(sorted(part[side] for part in samples[name]), axis=0) for name in sorted(samples)])


def _resampled(
    sums: Float[ndarray, "sample sum"], draws: int, generator: np.random.Generator
) -> Iterator[Float[ndarray, "draw sum"]]:
    """Yield the totals of samples drawn with replacement, some draws at once."""
    count = len(sums)
    at_once = max(1, WEIGHTS_AT_ONCE // count)
    for start in range(0, draws, at_once):
        number = min(at_once, draws - start)
        drawn = generator.integers(0, count, (number, count)) + count * np.arange(number)[:, None]
        # How often each sample was drawn: their totals are then one product.
        yield np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count) @ sums


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
