"""Measures from the sums of images: the value of their totals, and an interval over images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from mmray.data.image_keys import image_key
from mmray.statistics.shares import share_interval

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap interval."""
WEIGHTS_AT_ONCE = 2**24
"""Draws × images held in memory at once (128 MB)."""

Value = Callable[[Float[ndarray, "draw sum"]], Float[ndarray, " draw"]]
"""A measure as a function of totals; NaN where it has no value."""


@dataclass(frozen=True)
class Measured:
    """A measure before and after an edit, the interval of the latter, and the number of images. None: no value."""

    before: float | None
    after: float | None
    low: float | None
    high: float | None
    n: int


def ratio(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the first sum over the second; NaN for a second one of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Float[ndarray, " draw"] = totals[:, 0] / totals[:, 1]
    return np.where(totals[:, 1] > 0, share, np.nan)


def measure(
    before: Float[ndarray, "image sum"],
    after: Float[ndarray, "image sum"],
    value: Value = ratio,
    draws: int = 1000,
    seed: int = 0,
    *,
    share: bool = False,
) -> Measured:
    """Return a measure over images (one at least) in a fixed order: each row has the sums of one image.

    A `share` lies between 0 and 1. Its interval is that of `share_interval`, unless it is a mean of fractions. All
    other measures have a percentile bootstrap: images are drawn with replacement, and their sums added. Draws without a
    value (nothing to count was drawn) are left out.
    """
    total = float(value(after.sum(axis=0)[None])[0])
    interval = share_interval(after, total) if share and np.isfinite(total) else None
    low, high = interval or _percentiles(after, value, draws, seed)
    if share:
        # Draws of the properties' AUROC are linearised, and may leave the range by a little.
        low, high = max(low, 0.0), min(high, 1.0)
    return Measured(
        before=_known(value(before.sum(axis=0)[None])[0]),
        after=_known(total),
        low=_known(low),
        high=_known(high),
        n=len(after),
    )


def _percentiles(sums: Float[ndarray, "image sum"], value: Value, draws: int, seed: int) -> tuple[float, float]:
    values = np.concatenate([value(totals) for totals in _resampled(sums, draws, np.random.default_rng(seed))])
    found = values[np.isfinite(values)]
    low, high = np.percentile(found, INTERVAL) if len(found) else (np.nan, np.nan)
    return float(low), float(high)


def totals_by_image(images: Sequence[str], *sums: Float[ndarray, " row"]) -> Float[ndarray, "image sum"]:
    """Return the totals of rows that belong to one image each, images in order of their keys."""
    names, index = np.unique(np.array(images), return_inverse=True)
    total = np.zeros((len(names), len(sums)))
    np.add.at(total, index, np.stack(sums, axis=1))
    return total


def by_measure(measurements: pa.Table) -> dict[str, tuple[Float[ndarray, "image sum"], Float[ndarray, "image sum"]]]:
    """Return measure → the sums of its images before and after, images by key, whatever the order of rows."""
    grouped: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for row in measurements.to_pylist():
        image = image_key(row["sample_id"], row["image"])
        parts = grouped.setdefault(row["measure"], {}).setdefault(image, [])
        parts.append((row["before"], row["after"]))
    return {name: (_sums(images, 0), _sums(images, 1)) for name, images in sorted(grouped.items(), key=lambda g: g[0])}


def _sums(images: Mapping[str, list[tuple[list[float], list[float]]]], side: int) -> Float[ndarray, "image sum"]:
    # Sorted, because the order of addition changes the last bits of a sum.
    return np.array([np.sum(sorted(part[side] for part in images[name]), axis=0) for name in sorted(images)])


def _resampled(
    sums: Float[ndarray, "image sum"], draws: int, generator: np.random.Generator
) -> Iterator[Float[ndarray, "draw sum"]]:
    """Yield the totals of images drawn with replacement, in blocks of draws."""
    count = len(sums)
    at_once = max(1, WEIGHTS_AT_ONCE // count)
    for start in range(0, draws, at_once):
        number = min(at_once, draws - start)
        # Each draw is shifted by its own multiple of `count`, so that one bincount counts all draws.
        drawn = generator.integers(0, count, (number, count)) + count * np.arange(number)[:, None]
        # How often each draw has each image: all totals are then one matrix product.
        yield np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count) @ sums


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
