"""Sparse logistic regression by scikit-learn: a path of L1 penalties over standardised columns.

Minimised is mean(log(1 + exp(-s·(x·w + b)))) + penalty · ‖w‖₁ with s = ±1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

INTERCEPT = 100.0
"""The intercept is the weight of a column of this size, so that the penalty on it is as many times lower."""


@dataclass(frozen=True)
class Logistic:
    """A fitted model of standardised columns."""

    mean: Float[ndarray, " column"]
    scale: Float[ndarray, " column"]
    """Standard deviation of each column; 1 for a constant one."""
    weights: Float[ndarray, " column"]
    """Of the standardised columns: log-odds per standard deviation."""
    intercept: float

    def scores(self, values: Float[ndarray, "row column"]) -> Float[ndarray, " row"]:
        """Return the log-odds of each row."""
        used = np.flatnonzero(self.weights)
        found: Float[ndarray, " row"] = (values[:, used] - self.mean[used]) / self.scale[used] @ self.weights[used]
        return found + self.intercept


def fit_path(
    values: Float[ndarray, "row column"], truth: Bool[ndarray, " row"], fractions: Sequence[float]
) -> Iterator[Logistic]:
    """Yield the model of each penalty, given as a fraction of the least one at which every weight is zero.

    Both outcomes must occur.
    """
    # Takes a second to import.
    from sklearn.linear_model import LogisticRegression

    mean, scale = values.mean(axis=0), values.std(axis=0)
    # A constant column can't be standardised, and says nothing.
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    columns = (values - mean) / scale
    highest = float(np.abs(columns.T @ (truth - truth.mean())).max()) / len(truth)
    for fraction in fractions:
        # Its weight of the loss is that of the sum over rows, relative to ‖w‖₁.
        loss = 1 / max(len(truth) * fraction * highest, 1e-30)
        # Draws the order in which it visits columns.
        model = LogisticRegression(
            l1_ratio=1.0, C=loss, solver="liblinear", intercept_scaling=INTERCEPT, tol=1e-5, random_state=0
        )
        model.fit(columns, truth)
        yield Logistic(mean, scale, model.coef_[0], float(model.intercept_[0]))
