"""The highest of many numbers are those that `topk` finds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.census.top import top


@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 4), st.booleans(), st.data())
def test_top_is_topk_with_ties_in_any_order(seed, columns, rows, ties, data):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, columns, generator=generator) - 0.5
    if ties:
        values = (4 * values).round()
    count = data.draw(st.integers(1, min(columns, 20)))
    found, index = top(values, count)
    assert torch.equal(found, values.topk(count, dim=1).values)
    assert torch.equal(values.gather(1, index), found)
    # Each column at most once.
    assert all(len(set(row)) == count for row in index.tolist())
