"""Wilson intervals of shares whose outcomes are correlated within images.

Bootstrapping fails near 0 and 1: every draw from fourteen successes is fourteen successes, so a percentile interval
covers the truth far less often than 95 %.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray

NORMAL = 1.959964
"""Half-width in standard deviations of the central 95 % of a normal distribution."""


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent outcomes (Wilson 1927)."""
    square = NORMAL**2 / n
    middle = (share + square / 2) / (1 + square)
    half = sqrt(share * (1 - share) * NORMAL**2 / n + square**2 / 4) / (1 + square)
    # Rounding must not leave the share outside its own interval.
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def share_interval(sums: Float[ndarray, "image sum"], share: float) -> tuple[float, float] | None:
    """Return the 95 % interval of a share from each image's sums: successes, and outcomes last.

    n is the effective sample size: the outcomes over the design effect, which images with correlated outcomes raise; at
    most all outcomes. None for a mean of fractions, which the bootstrap serves better.
    """
    counted = sums[:, -1]
    # Without variation there is no design effect to estimate: every image with an outcome counts once.
    if share in (0.0, 1.0):
        return wilson(share, int((counted > 0).sum()) or len(sums))
    if sums.shape[1] != 2 or not _are_counts(sums):
        return None
    total = counted.sum()
    # The linearised variance of a ratio of sums, over images.
    variance = float(np.square(sums[:, 0] - share * counted).sum()) / total**2
    effective = share * (1 - share) / variance if variance > 0 else np.inf
    return wilson(share, min(effective, float(total)))


def _are_counts(sums: Float[ndarray, "image sum"]) -> bool:
    within = (sums[:, 0] >= 0) & (sums[:, 0] <= sums[:, 1])
    return bool(within.all() and (sums == np.rint(sums)).all())
