"""The control of an edit: as many neurons of the same layers, and none of those that it controls for."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mmray.errors import InputError
from mmray.features.editing.locating import matched

WIDTH = 8
MODEL: Any = SimpleNamespace(widths=(WIDTH, WIDTH, WIDTH))
NEURONS = st.sets(st.tuples(st.integers(0, 2), st.integers(0, WIDTH - 1)), min_size=1, max_size=12)


@given(NEURONS, st.integers(0, 50))
def test_random_neurons_are_others_of_the_same_layers(located: set[tuple[int, int]], seed: int) -> None:
    per_layer = Counter(layer for layer, _ in located)
    neurons = sorted(located)
    if max(per_layer.values()) > WIDTH // 2:
        with pytest.raises(InputError, match="a layer has too few others; lower --neurons"):
            matched(MODEL, neurons, seed)
        return
    drawn = matched(MODEL, neurons, seed)
    assert not located & set(drawn)
    assert len(set(drawn)) == len(located)
    assert Counter(layer for layer, _ in drawn) == per_layer
    assert matched(MODEL, neurons, seed) == drawn
