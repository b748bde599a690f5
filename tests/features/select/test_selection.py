"""Neurons chosen together lower their own noun and leave the others, where taken one by one they would not."""

import itertools

import numpy as np
import pytest
import torch

from mmray.features.select.effects import CandidateEffects
from mmray.features.select.selection import CandidateSums, choose, expected
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.scoring import score_batch
from tests.support.samples import CAPTIONS, batch_of


def effects(own, others, own_odds=2.0, other_odds=2.0, elsewhere=None):
    own, others = torch.tensor(own), torch.tensor(others)
    elsewhere = others.square().mean(0).sqrt() if elsewhere is None else torch.tensor(elsewhere)
    return CandidateSums(
        own, torch.full((len(own),), own_odds), others, torch.full((len(others),), other_odds), elsewhere
    )


def test_a_neuron_that_hurts_others_as_much_is_left_out():
    given = effects([[1.0, 1.0, 0.9]], [[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    assert sorted(choose(given, 2).tolist()) == [0, 2]
    assert len(choose(given, 5)) == 3


def test_small_harm_to_the_same_noun_adds_up():
    # Each of the first three hurts the one other place; the last two hurt none and give less.
    own = [[1.0, 1.0, 1.0, 0.8, 0.8]]
    same = effects(own, [[0.6, 0.6, 0.6, 0.0, 0.0]], other_odds=0.0, elsewhere=[0.0] * 5)
    assert set(choose(same, 2).tolist()) == {3, 4}
    # What one of them does another undoes: together they hurt nobody.
    opposed = effects(own, [[0.6, -0.6, 0.6, 0.0, 0.0]], other_odds=0.0, elsewhere=[0.0] * 5)
    assert 1 in choose(opposed, 3).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_set_is_about_as_good_as_the_best(seed):
    random = torch.Generator().manual_seed(seed)
    own, others = torch.rand(3, 9, generator=random) * 2, torch.randn(20, 9, generator=random) * 0.4
    given = CandidateSums(own, torch.full((3,), 3.0), others, torch.full((20,), 1.0), torch.zeros(9))
    values = {
        chosen: own[:, chosen].sum(1).mean() - 5 * abs(expected(given, chosen)[1])
        for chosen in itertools.combinations(range(9), 4)
    }
    mine = float(values[tuple(sorted(choose(given, 4).tolist()))])
    better = sum(float(value) > mine for value in values.values())
    assert better <= 0.15 * len(values)


def test_what_is_expected_is_the_fall_of_the_log_probability():
    given = effects([[1.0, 2.0], [0.0, 3.0]], [[0.5, 0.0]])
    own, others = expected(given, [0, 1])
    log = torch.nn.functional.logsigmoid
    odds, after = torch.tensor(2.0), torch.tensor([-1.0, -1.0])
    assert own == pytest.approx(float(log(odds) - log(after).mean()))
    assert others == pytest.approx(float(log(odds) - log(torch.tensor(1.5))))


def test_effects_are_kept_by_concept_and_candidate(open_model):
    model = open_model("llava")
    candidates = {"dog": np.array([70, 3, 11]), "cat": np.array([3, 95])}
    kept = CandidateEffects(candidates)
    batches = [batch_of(model, CAPTIONS[:2]), batch_of(model, CAPTIONS[2:4], first=2)]
    for batch, places in batches:
        kept.add(model, batch, places)
    concepts = [place.concept for _, places in batches for place in places]
    scores = torch.cat([torch.cat(score_batch(model, *pair, "effect").scores, 1) for pair in batches])
    first = torch.cat([torch.cat(gradient_pass(model, *pair, "effect")[0], 1) for pair in batches])
    log_prob = torch.cat([score_batch(model, *pair).log_prob for pair in batches])
    for concept, neurons in candidates.items():
        own = torch.tensor([name == concept for name in concepts])
        found = kept.of(concept)
        torch.testing.assert_close(found.own, first[own][:, neurons], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.others, first[~own][:, neurons], rtol=1e-4, atol=1e-6)
        elsewhere = scores[~own][:, neurons].square().mean(0).sqrt()
        torch.testing.assert_close(found.elsewhere, elsewhere, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.sigmoid(found.own_log_odds), log_prob[own].exp(), rtol=1e-4, atol=1e-5)
        assert set(kept.choose(concept, 2)) <= set(neurons.tolist())


def test_effects_of_parts_are_those_of_the_whole(open_model):
    model = open_model("llava")
    candidates = {"dog": np.array([70, 3, 11]), "cat": np.array([3, 95])}
    whole, gathered = CandidateEffects(candidates), CandidateEffects(candidates)
    for pair in (batch_of(model, CAPTIONS[:2]), batch_of(model, CAPTIONS[2:4], first=2)):
        part = CandidateEffects(candidates)
        for collected in (whole, part):
            collected.add(model, *pair)
        gathered.add_part(part.table())
        gathered.add_part(CandidateEffects(candidates).table())
    for concept in candidates:
        for own, other in zip(vars(whole.of(concept)).values(), vars(gathered.of(concept)).values(), strict=True):
            assert torch.equal(own, other)
        assert whole.choose(concept, 2) == gathered.choose(concept, 2)
