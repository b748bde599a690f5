"""Selection by contribution: a planted neuron is found, one that serves two labels is neither's."""

import torch

from mmray.features.selectivity.contrast import choose, contrasts


def test_a_contrast_is_what_no_other_label_gets():
    contribution = torch.tensor([[3.0, 1.0, -2.0], [2.0, 2.0, 0.0], [-1.0, 0.5, 0.0]])
    expected = [[1.0, -2.0, -5.0], [0.0, 0.0, -2.0], [-1.5, -0.5, -1.0]]
    torch.testing.assert_close(contrasts(contribution), torch.tensor(expected, dtype=torch.float64))


def test_a_neuron_belongs_to_one_label_at_most():
    contribution = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    chosen = choose(contribution, 0.1)
    assert (chosen.member.sum(dim=1) == 1).all()
    assert (contrasts(contribution)[chosen.neurons][chosen.member] > 0).all()
    for label in range(4):
        own = chosen.of(label)
        assert len(own) <= 50
        column = contrasts(contribution)[:, label]
        others = torch.ones(500, dtype=torch.bool)
        others[own] = False
        assert column[others].max() <= column[own].min()
        assert (column[own].diff() <= 0).all()
    assert (chosen.score.diff() <= 0).all()


def test_fewer_are_chosen_where_fewer_stand_out():
    contribution = torch.zeros(100, 2)
    contribution[3, 0] = contribution[5, 1] = 1.0
    chosen = choose(contribution, 0.1)
    assert (chosen.of(0).tolist(), chosen.of(1).tolist()) == ([3], [5])
