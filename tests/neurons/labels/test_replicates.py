"""Draws: shuffled labels are a permutation, drawn samples keep their label, and sums by matrix are plain sums."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from mmray.neurons.labels.replicates import draw

labelled = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.sampled_from("xyz"), min_size=3, max_size=30)


@given(labelled, st.integers(0, 3), st.integers(0, 3))
def test_every_replicate_keeps_the_labels_sizes(samples, permutations, bootstraps):
    found = draw(samples, permutations, bootstraps, seed=1)
    assert len(found) == 1 + permutations + bootstraps
    sizes = Counter(samples.values())
    for label, times in zip(found.label, found.times, strict=True):
        assert {name: int(times[label == place].sum()) for place, name in enumerate(found.labels)} == sizes
    assert [found.labels[label] for label in found.label[0]] == [samples[name] for name in found.samples]
    assert (found.times[: 1 + permutations] == 1).all()
    assert (found.label[1 + permutations :] == found.label[0]).all()


@given(labelled)
def test_the_order_of_samples_changes_nothing(samples):
    one, other = (draw(dict(pairs), 2, 2, 5) for pairs in (samples.items(), reversed(samples.items())))
    assert one.samples == other.samples
    np.testing.assert_array_equal(one.label, other.label)
    np.testing.assert_array_equal(one.times, other.times)


@given(labelled)
def test_the_matrix_adds_up_as_a_loop_does(samples):
    found = draw(samples, 1, 2, seed=3)
    names = list(found.samples)[::2]
    values = np.arange(1.0, 1 + len(names))
    sums = (found.matrix(names).numpy() @ values).reshape(len(found), len(found.labels))
    for replicate in range(len(found)):
        for place in range(len(found.labels)):
            expected = sum(
                value * found.times[replicate, found.samples.index(name)]
                for name, value in zip(names, values, strict=True)
                if found.label[replicate, found.samples.index(name)] == place
            )
            assert sums[replicate, place] == expected


def test_other_seeds_draw_otherwise():
    samples = {f"s{number}": "xy"[number % 2] for number in range(40)}
    assert not np.array_equal(draw(samples, 1, 0, 1).label, draw(samples, 1, 0, 2).label)
