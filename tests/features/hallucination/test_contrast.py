"""Moments of units add up to those of all mentions, however they were cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.hallucination.contrast import ClassSums, Moments, effect, merged
from mmray.features.hallucination.mentions import QUANTITIES

WIDTHS = (3, 2)


def values(seed, rows):
    # Means that are large against the deviations: a difference of sums of squares would lose them.
    return 1e4 + np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32).astype(float)


@given(st.integers(0, 99), st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_moments_are_those_of_all_rows_together(seed, sizes):
    whole = values(seed, sum(sizes))
    parts = [Moments.of(part) for part in np.split(whole, np.cumsum(sizes)[:-1])]
    for ordered in (parts, parts[::-1]):
        found = ordered[0]
        for part in ordered[1:]:
            found = found + part
        assert found.n == len(whole)
        if len(whole):
            np.testing.assert_allclose(found.mean, whole.mean(0))
            np.testing.assert_allclose(found.squares, len(whole) * whole.var(0), rtol=1e-6, atol=1e-9)


def test_units_are_merged_by_class_and_quantity():
    draw = np.random.default_rng(1)
    every = [{name: draw.normal(size=(9, width)) for name in QUANTITIES} for width in WIDTHS]
    kinds = np.array([True, False, False, True, True, False, False, False, True])
    parts = []
    for part in (slice(0, 2), slice(2, 9)):
        sums = ClassSums(WIDTHS)
        sums.add(kinds[part], [{name: layer[name][part] for name in QUANTITIES} for layer in every])
        parts.append(sums.table())
    found = merged(iter(parts))
    for (kind, name), moments in found.items():
        own = np.concatenate([layer[name][kinds == kind] for layer in every], axis=1)
        np.testing.assert_allclose(moments.mean, own.mean(0))
        np.testing.assert_allclose(moments.variance, own.var(0, ddof=1))
    assert set(found) == {(kind, name) for kind in (True, False) for name in QUANTITIES}


def test_the_effect_is_cohens_d():
    one, other = values(1, 7), values(2, 5) + 0.5
    pooled = np.sqrt((6 * one.var(0, ddof=1) + 4 * other.var(0, ddof=1)) / 10)
    np.testing.assert_allclose(effect(Moments.of(one), Moments.of(other)), (one.mean(0) - other.mean(0)) / pooled)
    constant = Moments.of(np.ones((4, 3)))
    assert not effect(constant, constant).any()
    assert not effect(Moments.of(np.ones((1, 3))), constant).any()
    assert np.isnan(Moments.of(np.ones((1, 3))).variance).all()


def test_the_order_of_units_changes_rounding_alone():
    parts = [Moments.of(values(seed, 3)) for seed in range(4)]
    forth, back = parts[0] + parts[1] + parts[2] + parts[3], parts[3] + (parts[2] + (parts[1] + parts[0]))
    assert forth.squares == pytest.approx(back.squares, rel=1e-9)
