"""A forward that starts at the first zeroed neuron gives what a whole one gives."""

import pytest
import torch

import mmray
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.ablation import Ablator
from mmray.neurons.scoring import score_batch
from tests.support.samples import CAPTIONS, batch_of


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("neurons", [[(1, 3), (1, 7)], [(0, 1), (1, 5)], [(0, 2), (0, 9)]])
def test_starting_late_changes_nothing(open_model, variant, neurons):
    model = open_model(variant)
    batch, places = batch_of(model, CAPTIONS[:3])
    ablator = Ablator(model, batch, places)
    # Qwen3-VL adds image features between its first blocks.
    assert ablator.resumes is not variant.startswith("qwen3")
    plain = score_batch(model, batch, places).log_prob
    torch.testing.assert_close(ablator.unchanged, plain)
    with mmray.ablate(model, neurons):
        expected = score_batch(model, batch, places).log_prob - plain
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(ablator.changed(neurons, mmray.ablate(model, neurons)), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(score_batch(model, batch, places).log_prob, plain)
