"""Definitions of properties against their plain words, and controls that are what they say."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.properties.measures import (
    above,
    common_share,
    exact_hit,
    highest,
    jaccard,
    lemma_hit,
    overlap,
    pairwise_jaccard,
    set_mean,
    specific_order,
)
from mmray.neurons import controls

SETS = st.sets(st.integers(0, 20), min_size=1, max_size=8).map(frozenset)


@given(SETS, SETS)
def test_agreement_of_sets(one, other):
    assert jaccard(one, other) == jaccard(other, one) == len(one & other) / len(one | other)
    assert jaccard(one, one) == overlap(one, one) == 1
    assert 0 <= jaccard(one, other) <= overlap(one, other) <= 1


@given(st.lists(SETS, min_size=2, max_size=5))
def test_the_mean_of_pairwise_jaccard_is_that_of_all_pairs(sets):
    pairs = [jaccard(one, other) for at, one in enumerate(sets) for other in sets[at + 1 :]]
    found = pairwise_jaccard(sets)
    assert sum(found) / len(found) == pytest.approx(sum(pairs) / len(pairs))
    assert common_share(sets) <= min(overlap(sets[0], other) for other in sets)
    assert pairwise_jaccard(sets[:1]) == []


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_auroc_counts_pairs(own, others):
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in others]
    found = above(torch.tensor(own, dtype=torch.float), torch.tensor(others, dtype=torch.float))
    assert float(found.mean()) == pytest.approx(sum(pairs) / len(pairs))


def test_highest_and_means():
    scores = torch.tensor([[1.0, 5.0, 3.0], [9.0, 0.0, 2.0]])
    assert highest(scores, 2) == [{1, 2}, {0, 2}]
    assert highest(scores, 9) == [{0, 1, 2}] * 2
    assert set_mean(scores, torch.tensor([0, 2])).tolist() == [2.0, 5.5]


def test_specific_takes_off_what_others_get_and_never_adds():
    scores = torch.tensor([[4.0, 4.0, 4.0], [1.0, -3.0, 0.0], [3.0, -1.0, 0.0]])
    own = torch.tensor([True, False, False])
    assert specific_order(scores, own).tolist() == [2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("tokens", "exact", "lemma"),
    [
        (["dogs", "x"], False, True),
        (["Dog"], True, True),
        (["do"], False, False),
        (["hot", "cats"], False, False),
        ([], False, False),
    ],
)
def test_hits(tokens, exact, lemma):
    assert exact_hit(tokens, "dog") is exact
    assert lemma_hit(tokens, "dog", "dog", "en") is lemma


def test_the_scored_token_of_a_longer_noun_is_a_hit():
    assert lemma_hit(["mar"], "martillo", "mar", "es")
    assert not lemma_hit(["mar"], "martillo", "mart", "es")


WIDTHS = (30, 50, 20)
NEURONS = [(0, 1), (0, 2), (2, 5), (2, 6), (2, 7)]


@pytest.mark.parametrize("draw", [controls.uniform, controls.layer_matched])
def test_controls_are_as_many_others(draw):
    found = draw(WIDTHS, NEURONS, "seed")
    assert len(set(found)) == len(NEURONS)
    assert not set(found) & set(NEURONS)
    assert all(0 <= unit < WIDTHS[layer] for layer, unit in found)
    assert found == draw(WIDTHS, NEURONS, "seed")
    assert found != draw(WIDTHS, NEURONS, "other")


def test_layers_are_matched():
    found = controls.layer_matched(WIDTHS, NEURONS, "seed")
    assert Counter(layer for layer, _ in found) == {0: 2, 2: 3}


def test_a_layer_that_is_taken_whole_has_no_control():
    assert controls.layer_matched((2, 3), [(0, 0), (0, 1)], "seed") == []


@pytest.mark.parametrize("draw", [controls.uniform, controls.layer_matched])
def test_controls_are_other_neurons_as_many_as_there_are(draw):
    assert len(set(draw((40, 30), [(0, unit) for unit in range(10)], "seed"))) == 10
    found = draw((12, 0), [(0, unit) for unit in range(10)], "seed")
    assert sorted(found) == [(0, 10), (0, 11)]


def test_activations_are_matched():
    generator = torch.Generator().manual_seed(0)
    activations = [torch.rand(width, generator=generator) * (layer + 1) for layer, width in enumerate((400, 300))]
    neurons = [(1, unit) for unit in activations[1].topk(40).indices.tolist()]
    found = controls.activation_matched(activations, neurons, "seed")
    assert len(set(found)) == 40
    assert not set(found) & set(neurons)

    def mean(chosen: list[tuple[int, int]]) -> float:
        return float(torch.stack([activations[layer][unit] for layer, unit in chosen]).mean())

    plain = controls.uniform((400, 300), neurons, "seed")
    assert abs(mean(found) - mean(neurons)) < 0.5 * abs(mean(plain) - mean(neurons))
