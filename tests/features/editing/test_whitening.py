"""Shapes keep an edit out of the directions that kept answers use."""

import pytest
import torch

from mmray.features.editing import whitening as module
from mmray.features.editing.baselines import whole_layers
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import resume, resume_all
from mmray.features.editing.whitening import Curvature, null_space, whitening
from mmray.models.norms import vocabulary_logits
from tests.support.samples import CAPTIONS, batch_of


@pytest.fixture
def activations():
    """Return activations of 12 neurons that use 5 directions only."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 5, generator=generator) @ torch.randn(5, 12, generator=generator)


def test_whitening_makes_every_direction_cost_the_same(activations):
    moment = activations.T @ activations / len(activations)
    ridge = 0.1 * moment.diagonal().mean() * torch.eye(12)
    shape = whitening(moment, 0.1)
    cost = shape @ (moment + ridge) @ shape
    assert torch.allclose(cost, torch.eye(12), atol=1e-3)


def test_an_edit_in_the_null_space_leaves_kept_outputs_alone(activations):
    change = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    shape = null_space(activations.T @ activations / len(activations), 1e-6)
    assert (activations @ change).abs().max() > 1
    assert (activations @ shape @ change).abs().max() < 1e-3
    # 7 of the 12 directions are free, and there the edit can do what it likes.
    assert int((torch.linalg.eigvalsh(shape) > 0.1).sum()) == 7
    assert float((shape @ change).norm()) > 1


def test_all_of_a_used_space_leaves_one_direction():
    shape = null_space(torch.eye(4), 1e-9)
    assert int((torch.linalg.eigvalsh(shape) > 0.1).sum()) == 1


def test_a_shape_says_which_changes_deltas_can_be(open_model):
    model = open_model("llava")
    deltas = Deltas(model, [(1, 3), (1, 20), (1, 7)])
    deltas.parameters[1][0].data.fill_(1.0)
    width = deltas.rows(1).shape[1]
    right = torch.zeros(width, width)
    right[:, 4] = 1 / width
    deltas.shapes[1] = torch.diag(torch.tensor([1.0, 0.0, 2.0])), right
    rows = deltas.rows(1).detach()
    assert rows[:, 4].tolist() == pytest.approx([1.0, 0.0, 2.0])
    assert rows.count_nonzero() == 2
    # A plain size is that of the rows; a whitened one half the parameters' square.
    assert float(deltas.size().detach()) == pytest.approx(5 / (deltas.scales[1] ** 2 * width), rel=1e-4)
    deltas.whitened = True
    assert float(deltas.size().detach()) == pytest.approx(3 * width / 2, rel=1e-4)


def test_whitened_size_is_the_cost_for_kept_answers(activations):
    generator = torch.Generator().manual_seed(3)
    free, gradients = torch.randn(12, 7, generator=generator), torch.randn(300, 7, generator=generator)
    moment, scores = activations.T @ activations / len(activations), gradients.T @ gradients / len(gradients)
    left, right = whitening(moment, 0.1), whitening(scores, 1.0)
    change = left @ free @ right
    ridges = (moment, 0.1), (scores, 1.0)
    first, second = (one + ridge * one.trace() / len(one) * torch.eye(len(one)) for one, ridge in ridges)
    cost = (change.T @ first @ change @ second).trace()
    other = left @ (2 * free.flip(0)) @ right
    assert float(cost) == pytest.approx(float(free.square().sum()), rel=1e-3)
    # Four times the parameters' square is four times the cost, whatever their direction.
    assert float((other.T @ first @ other @ second).trace()) == pytest.approx(4 * float(cost), rel=1e-3)


def test_fisher_is_the_curvature_of_the_divergence(open_model, monkeypatch):
    """KL(before ‖ after) of a small step of the states is ½ δᵀFδ, on average over positions."""
    model = open_model("llava")
    monkeypatch.setattr(module, "DRAWS", 400)
    batch, _ = batch_of(model, CAPTIONS[:2])
    examples = [Example("Say it.", None, tuple(tokens)) for tokens in batch.tokens]
    found = Curvature(model, {"replies": examples}, {}, 0).fisher
    last = Deltas(model, [(len(model.widths) - 1, 0)])
    states = torch.cat([part.states(None) for part, _ in resume_all(model, examples, last)])
    with torch.no_grad():
        before = vocabulary_logits(model, states).log_softmax(1)
        for seed in range(4):
            step = 1e-2 * torch.randn(states.shape[1], generator=torch.Generator().manual_seed(seed))
            after = vocabulary_logits(model, states + step).log_softmax(1)
            divergence = (before.exp().double() * (before.double() - after.double())).sum(1).mean()
            assert float(divergence) == pytest.approx(float(step @ found @ step) / 2, rel=0.2)


def test_the_second_moment_is_the_mean_over_kinds(open_model):
    model = open_model("llava")
    batch, _ = batch_of(model, CAPTIONS[:2])
    prompt, layer = "Say it.", len(model.widths) - 1
    examples = [Example(prompt, None, tuple(tokens)) for tokens in batch.tokens]
    deltas = Deltas(model, whole_layers(model, [layer]))
    kinds = {"a": examples[:1], "b": examples[1:], "c": []}
    one, other = (Curvature(model, {"a": [example]}, {}, 0).second_moment(deltas, layer) for example in examples)
    both = Curvature(model, kinds, {"b": 3.0}, 0).second_moment(deltas, layer)
    assert torch.allclose(both, (one + 3 * other) / 4, atol=1e-6)


def test_steps_on_shaped_activations_are_those_of_the_rows(open_model):
    model = open_model("llava")
    batch, _ = batch_of(model, CAPTIONS[:2])
    deltas = Deltas(model, [(1, 3), (1, 20), (1, 7)])
    width, generator = deltas.rows(1).shape[1], torch.Generator().manual_seed(0)
    deltas.shapes[1] = torch.randn(3, 3, generator=generator), torch.randn(width, width, generator=generator)
    deltas.parameters[1][0].data.normal_(std=0.1, generator=generator)
    part = resume(model, batch, deltas)
    found, expected = part.shaped_by(deltas).states(deltas), part.states(deltas)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - part.states(None)).detach().abs().max()) > 0.1
    gradients = [torch.autograd.grad(one.square().sum(), deltas.parameters[1])[0] for one in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3)


def test_shapes_of_the_same_neurons_are_made_once(open_model):
    model = open_model("llava")
    batch, _ = batch_of(model, CAPTIONS[:2])
    curvature = Curvature(model, {"a": [Example("Say it.", None, tuple(batch.tokens[0]))]}, {}, 0)
    one, same, other = (Deltas(model, [(1, unit) for unit in units]) for units in ((3, 7), (3, 7), (3, 8)))
    left, right = curvature.shape(one, 1)
    assert curvature.shape(same, 1)[0] is left
    assert not torch.equal(curvature.shape(other, 1)[0], left)
    assert torch.allclose(left, whitening(curvature.second_moment(one, 1), module.INPUT_RIDGE))
    assert torch.allclose(right, whitening(curvature.fisher, module.OUTPUT_RIDGE))
