"""Ranks are those of a full sort, and their certificates those of the definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.census.concept_merge import ConceptScores
from mmray.features.census.ranking import highest, ranks

VALUES = st.one_of(
    st.floats(allow_nan=False),
    st.floats(-1, 1),
    # Ties, zeros of both signs, and neighbours that differ in the last bit.
    st.sampled_from([0.0, -0.0, 1.0, float(np.nextafter(1, 2)), -1.0, 5e-324, -np.inf]),
)


@given(st.lists(VALUES, min_size=1, max_size=40), st.data())
def test_ranks_are_those_of_a_full_sort(values: list[float], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(values) - 1), unique=True))
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    expected = [order.index(row) + 1 for row in rows]
    assert ranks(np.array(values), np.array(rows, np.int64)).tolist() == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.integers(1, 30), st.sampled_from([3, 50, 10**6]))
def test_the_highest_are_those_of_a_full_sort(seed: int, length: int, count: int, different: int) -> None:
    values = np.random.default_rng(seed).integers(0, different, length).astype(float)
    # High values where a sample looks, and low ones elsewhere: it misleads.
    values[:: 1 + seed % 20] += different
    expected = sorted(range(length), key=lambda place: (-values[place], place))[:count]
    assert highest(values, count).tolist() == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([5, 100, 10**6]), st.floats(0, 1))
def test_a_rank_is_certified_if_no_bound_reaches_it(seed: int, neurons: int, different: int, known: float) -> None:
    random = np.random.default_rng(seed)
    score = random.integers(0, different, neurons).astype(float)
    exact = random.random(neurons) < known
    below, above = (np.where(exact, 0.0, random.integers(0, 1 + different // 10, neurons)) for _ in range(2))
    lower, upper, rows = score - below, score + above, random.permutation(neurons)[: 1 + neurons // 3]
    left_out, rounding = float(np.quantile(score, random.random())), random.choice([0.0, 0.25])
    own = np.arange(neurons)
    scores = ConceptScores(1, own, score, score, score, lower, upper, exact, left_out, rounding)

    def certain(row: int) -> bool:
        least, most = lower[row] - rounding, upper[row] + rounding
        reaching = (upper + rounding >= least) & (lower - rounding <= most) & (own != row)
        return bool(least > left_out and not (reaching & ~(exact & exact[row])).any())

    assert scores.certified(rows).tolist() == [certain(row) for row in rows]
