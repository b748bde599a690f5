"""Measures of totals, their intervals, and that neither the order nor the cut of rows changes them."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.statistics.bootstrap import by_measure, measure


def sums(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """400 samples of 80 with a true share of 0.3: of so many intervals of 95 %, 366 to 392 cover it (±3 deviations)."""
    random = np.random.default_rng(0)
    found = [measure(s := sums(random.binomial(1, 0.3, 80).astype(float)), s, seed=n) for n in range(400)]
    covered = sum(one.low <= 0.3 <= one.high for one in found if one.low is not None and one.high is not None)
    assert 366 <= covered <= 392


def test_the_interval_is_that_of_samples_drawn_with_replacement() -> None:
    """Against draws one by one, for a ratio whose numerator and denominator vary."""
    random = np.random.default_rng(1)
    rows = np.stack([random.poisson(2, 50), random.poisson(5, 50)], axis=1).astype(float)
    totals = [rows[random.integers(0, 50, 50)].sum(axis=0) for _ in range(4000)]
    low, high = np.percentile([one / of for one, of in totals], (2.5, 97.5))
    found = measure(rows, rows, draws=4000)
    assert found.low is not None
    assert found.high is not None
    assert abs(found.low - low) < 0.01
    assert abs(found.high - high) < 0.01
    assert found.before == found.after == rows[:, 0].sum() / rows[:, 1].sum()


def test_nothing_of_nothing_is_no_number() -> None:
    empty = np.zeros((3, 2))
    found = measure(empty, empty)
    assert (found.before, found.after, found.low, found.high, found.n) == (None, None, None, None, 3)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.floats(-1e3, 1e3), st.integers(1, 5)), min_size=1
    ),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_order_and_cut_change_not_a_bit(
    parts: list[tuple[str, str, float, int]], random: object, data: st.DataObject
) -> None:
    def table(parts: list[tuple[str, str, float, int]]) -> pa.Table:
        rows = MeasurementBuffer()
        for name, sample, value, of in parts:
            rows.share(name, sample, value / 3, value, of)
        return rows.tables()["measurements"]

    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    middle = data.draw(st.integers(0, len(parts)))
    whole, cut = table(parts), pa.concat_tables([table(shuffled[:middle]), table(shuffled[middle:])])
    ours, theirs = by_measure(whole), by_measure(cut)
    assert list(ours) == list(theirs)
    for name in ours:
        assert all(np.array_equal(one, other) for one, other in zip(ours[name], theirs[name], strict=True))
        assert measure(*ours[name], draws=20) == measure(*theirs[name], draws=20)
