"""Draws: shuffled labels are a permutation, drawn samples keep their label, and sums by matrix are plain sums."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from mmray.features.selectivity.replicates import draw

NAMES = st.text("abcdef", min_size=1, max_size=4)
labelled = st.dictionaries(NAMES, st.sampled_from("xyz"), min_size=3, max_size=30)


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


@given(labelled, st.integers(0, 5))
def test_images_of_one_sample_are_drawn_as_samples_were(samples, seed):
    """Figures of data without shared images are those of plain permutations and draws within labels."""
    found = draw(samples, 2, 2, seed)
    generator = np.random.default_rng(seed)
    own = found.label[0]
    for label in found.label[1:3]:
        np.testing.assert_array_equal(label, generator.permutation(own))
    for times in found.times[3:]:
        expected = np.zeros(len(own))
        for number in range(len(found.labels)):
            members = np.flatnonzero(own == number)
            np.add.at(expected, generator.choice(members, len(members)), 1)
        np.testing.assert_array_equal(times, expected)


@given(labelled, st.data())
def test_what_shares_an_image_stays_together(samples, data):
    images = {name: data.draw(st.sampled_from("pqrs")) for name in samples}
    found = draw(samples, 3, 3, seed=2, images=images)
    sizes = Counter(samples.values())
    image = np.array([images[name] for name in found.samples])
    own = found.label[0]
    for label, times in zip(found.label, found.times, strict=True):
        assert {name: int((label == place).sum()) for place, name in enumerate(found.labels)} == sizes
        # Images change places as they are: their labels are those of some image each.
        moved, before = (
            sorted(sorted(numbers[image == name].tolist()) for name in set(image)) for numbers in (label, own)
        )
        assert moved == before
        assert all(len(set(times[image == name])) == 1 for name in set(image))
    for times in found.times:
        assert all(times[own == place].any() for place in range(len(found.labels)))


def test_a_label_of_the_sample_moves_within_its_image_and_one_of_the_image_with_it():
    captions = [f"{image}-{number}" for image in "abcdefgh" for number in range(4)]
    images = {name: name[0] for name in captions}
    by_sample = draw({name: "wxyz"[int(name[2])] for name in captions}, 1, 0, 0, images)
    assert any(by_sample.label[0] != by_sample.label[1])
    by_image = draw({name: "xy"[name[0] < "d"] for name in captions}, 1, 0, 0, images)
    assert any(by_image.label[0] != by_image.label[1])
    assert (np.diff(by_image.label[1].reshape(8, 4), axis=1) == 0).all()
