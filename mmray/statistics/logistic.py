"""Sparse logistic regression: a path of L1 penalties, each solved to its optimality conditions.

Minimised is mean(log(1 + exp(-s·(x·w + b)))) + penalty · ‖w‖₁ with s = ±1; the intercept b is free. The solver is FISTA
with restarts (Beck & Teboulle 2009; O'Donoghue & Candès 2015) on a working set of columns, to which columns are added
until none violates the conditions. So a path over thousands of columns costs as much as the columns that it chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

TOLERANCE = 2e-3
"""By which fraction of the penalty the optimality conditions may be violated."""
ADDED = 200
"""Columns added to the working set at once, the worst first."""
MOST_STEPS = 5000
ROUNDS = 60
"""Rounds of adding columns; each ends with a solved working set."""


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

    Fractions must fall, because each model starts from the one before it. Both outcomes must occur.
    """
    mean, scale = values.mean(axis=0), values.std(axis=0)
    # A constant column can't be standardised, and says nothing.
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    columns = ((values - mean) / scale).astype(np.float32)
    outcome = truth.astype(np.float32)
    weights = np.zeros(columns.shape[1], np.float32)
    share = float(outcome.mean())
    intercept = float(np.log(share / (1 - share)))
    highest = float(np.abs(columns.T @ (outcome - share)).max()) / len(outcome)
    for fraction in fractions:
        weights, intercept = _solve(columns, outcome, fraction * highest, weights, intercept)
        yield Logistic(mean, scale, weights.astype(float), intercept)


def _solve(
    columns: Float[ndarray, "row column"],
    outcome: Float[ndarray, " row"],
    penalty: float,
    weights: Float[ndarray, " column"],
    intercept: float,
) -> tuple[Float[ndarray, " column"], float]:
    working = np.flatnonzero(weights)
    for _ in range(ROUNDS):
        slope = columns.T @ (_probability(columns @ weights + intercept) - outcome) / len(outcome)
        wrong = np.flatnonzero((np.abs(slope) > penalty * (1 + TOLERANCE)) & (weights == 0))
        working = np.union1d(working, wrong[np.argsort(-np.abs(slope[wrong]), kind="stable")][:ADDED]).astype(int)
        part, intercept = _descend(columns[:, working], outcome, penalty, weights[working], intercept)
        weights = np.zeros_like(weights)
        weights[working] = part
        if not len(wrong):
            break
        working = np.flatnonzero(weights)
    return weights, intercept


def _descend(
    columns: Float[ndarray, "row column"],
    outcome: Float[ndarray, " row"],
    penalty: float,
    weights: Float[ndarray, " column"],
    intercept: float,
) -> tuple[Float[ndarray, " column"], float]:
    """Return the optimum over these columns, from a start."""
    # A column of ones is the intercept.
    every = np.concatenate([columns, np.ones((len(columns), 1), np.float32)], axis=1)
    step = 4 * len(every) / _largest_square(every)
    threshold = np.full(every.shape[1], step * penalty, np.float32)
    threshold[-1] = 0
    current = np.append(weights, np.float32(intercept))
    ahead, momentum = current, 1.0
    for _ in range(MOST_STEPS):
        slope = every.T @ (_probability(every @ ahead) - outcome) / len(every)
        moved = ahead - step * slope
        after = np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)
        if (ahead - after) @ (after - current) > 0:
            momentum = 1.0
        later = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = (after + (momentum - 1) / later * (after - current)).astype(np.float32)
        change, current, momentum = float(np.abs(after - current).max()), after, later
        if change < TOLERANCE * step * penalty:
            break
    return current[:-1], float(current[-1])


def _probability(scores: Float[ndarray, " row"]) -> Float[ndarray, " row"]:
    # By tanh, which overflows nowhere.
    found: Float[ndarray, " row"] = 0.5 * (1 + np.tanh(scores / 2))
    return found


def _largest_square(columns: Float[ndarray, "row column"]) -> float:
    """Return an upper estimate of the largest squared singular value."""
    vector = np.ones(columns.shape[1], np.float32)
    size = 0.0
    for _ in range(30):
        vector = columns.T @ (columns @ (vector / np.linalg.norm(vector)))
        size = float(np.linalg.norm(vector))
    # Power iteration approaches from below.
    return 1.1 * size + 1e-12
