"""Intervals of shares: Wilson's, with the number of images that the outcomes amount to.

Resampling can't show what did not happen: of fourteen successes every draw is fourteen successes, and the percentile
interval of a share near 0 or 1 covers the truth far less often than it says.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray

NORMAL = 1.959964
"""Standard deviations on both sides of a mean that hold 95 % of a normal distribution."""


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent outcomes (Wilson 1927)."""
    square = NORMAL**2 / n
    middle = (share + square / 2) / (1 + square)
    half = sqrt(share * (1 - share) * NORMAL**2 / n + square**2 / 4) / (1 + square)
    # The interval holds the share itself; rounding must not take it out.
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def share_interval(sums: Float[ndarray, "image sum"], share: float) -> tuple[float, float] | None:
    """Return the 95 % interval of a share from each image's sums: what is counted, and of how many.

    Outcomes of one image go together, so n is the number of independent outcomes that would vary as the images do
    (their number over the design effect), at most all outcomes. At 0 and 1, where nothing varies, n is the number of
    images that have an outcome. None for a mean of fractions between 0 and 1: there images vary visibly, and resampling
    them tells more.
    """
    counted = sums[:, -1]
    if share in (0.0, 1.0):
        return wilson(share, int((counted > 0).sum()) or len(sums))
    if sums.shape[1] != 2 or not _are_counts(sums):
        return None
    total = counted.sum()
    variance = float(np.square(sums[:, 0] - share * counted).sum()) / total**2
    independent = share * (1 - share) / variance if variance > 0 else np.inf
    return wilson(share, min(independent, float(total)))


def _are_counts(sums: Float[ndarray, "image sum"]) -> bool:
    within = (sums[:, 0] >= 0) & (sums[:, 0] <= sums[:, 1])
    return bool(within.all() and (sums == np.rint(sums)).all())
