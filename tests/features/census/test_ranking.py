"""Ranks are those of a full sort."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.census.ranking import ranks

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
