"""What neurons read: the rows before them give their activations, and can be changed and restored to the byte."""

import pytest
import torch

from mmray.models.capture import capture_activations, capture_input
from mmray.models.interventions import changed_inputs
from mmray.models.mlp_inputs import MlpInputs
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import CAPTIONS, batch_of, logits, weights

EXPERTS = {"qwen3_vl_moe"}
ROUNDED = 1e-4
"""Largest relative error of activations in fp32."""


def read_by(model, layer):
    """Return what a layer's neurons read along two captions, and their activations."""
    projection, entered, seen = model.projections[layer], [], []
    inputs = MlpInputs.of(model.network, projection)
    batch, _ = batch_of(model, CAPTIONS[:2])
    with (
        torch.inference_mode(),
        capture_input(inputs.reader, entered.append),
        capture_activations(model.network, [projection], lambda _, activation, __: seen.append(activation)),
    ):
        model.network(**batch.to(model.device, model.network.dtype))
    return entered[-1].flatten(0, -2), seen[-1]


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - EXPERTS))
def test_rows_and_biases_give_the_activations(open_model, variant):
    model = open_model(variant)
    layer = len(model.widths) - 1
    inputs = MlpInputs.of(model.network, model.projections[layer])
    entered, activation = read_by(model, layer)
    units = torch.tensor([5, 0, model.widths[layer] - 1])
    found = inputs.activation(entered, inputs.rows(units), inputs.biases(units))
    assert (found - activation[:, units]).norm() <= ROUNDED * activation[:, units].norm()
    assert activation[:, units].norm() > 0


def test_experts_have_no_such_rows(open_model):
    model = open_model("qwen3_vl_moe")
    assert MlpInputs.of(model.network, model.projections[-1]) is None


@pytest.mark.parametrize("variant", ["llava", "blip2_opt", "blip2_t5", "gemma3"])
def test_a_neuron_with_the_rows_of_another_does_the_same(open_model, variant):
    model = open_model(variant)
    layer = len(model.widths) - 1
    inputs = MlpInputs.of(model.network, model.projections[layer])
    before, plain = weights(model), logits(model)
    units, others = torch.tensor([3, 7]), torch.tensor([9, 2])
    added = inputs.rows(others) - inputs.rows(units)
    with changed_inputs(model, layer, units, added):
        assert weights(model) != before
        _, activation = read_by(model, layer)
        if not inputs.biases(torch.cat([units, others])).any():
            torch.testing.assert_close(activation[:, units], activation[:, others], rtol=1e-4, atol=1e-5)
        assert not torch.equal(logits(model), plain)
    assert weights(model) == before
    assert torch.equal(logits(model), plain)
