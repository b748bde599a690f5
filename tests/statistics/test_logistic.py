"""Weights of the sparse regression meet the optimality conditions, which no other weights do."""

import numpy as np
import pytest

from mmray.statistics.logistic import fit_path


def data(seed=0, rows=300, columns=80):
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(rows, 5))
    # Correlated columns of several scales, one of them constant.
    values = (hidden @ draw.normal(size=(5, columns)) + draw.normal(size=(rows, columns))) * draw.uniform(
        0.1, 9, columns
    )
    values[:, 3] = 2.5
    return values, hidden[:, 0] + 0.5 * draw.normal(size=rows) > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_no_direction_lowers_the_objective(seed):
    """The slope of the loss is the penalty against each used column, at most that at others, zero at the intercept."""
    values, truth = data(seed)
    fractions = (0.5, 0.1, 0.02)
    columns = (values - values.mean(0)) / np.where(values.std(0) > 1e-9, values.std(0), 1)
    highest = np.abs(columns.T @ (truth - truth.mean())).max() / len(truth)
    sizes = []
    for fraction, model in zip(fractions, fit_path(values, truth, fractions), strict=True):
        scores = columns @ model.weights + model.intercept
        np.testing.assert_allclose(model.scores(values), scores, atol=1e-6)
        missed = 1 / (1 + np.exp(-scores)) - truth
        slope, penalty, used = columns.T @ missed / len(truth), fraction * highest, model.weights != 0
        np.testing.assert_allclose(slope[used], -penalty * np.sign(model.weights[used]), atol=0.01 * penalty)
        assert np.abs(slope[~used]).max() <= 1.01 * penalty
        assert abs(missed.mean()) <= 0.02 * penalty
        sizes.append(used.sum())
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_the_highest_penalty_uses_nothing_and_a_constant_column_is_never_used():
    values, truth = data()
    first, last = fit_path(values, truth, (1.0, 0.01))
    assert not first.weights.any()
    assert 1 / (1 + np.exp(-first.intercept)) == pytest.approx(truth.mean(), abs=5e-3)
    assert last.weights[3] == 0
