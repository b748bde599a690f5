"""What is measured of neurons at a mention: identities of the residual stream, and a plain loop."""

import pytest
import torch

from mmray.features.hallucination.mentions import FIT, TEST, fold_of, quantities
from mmray.models.parts import output_rows
from mmray.neurons.activation_cache import cache_activations, forward
from mmray.neurons.token_positions import TokenPosition
from tests.support.samples import CAPTIONS, batch_of

FAMILIES = ["llava", "qwen3_vl_moe"]


@pytest.fixture(params=FAMILIES)
def seen(request, open_model):
    model = open_model(request.param)
    batch, _ = batch_of(model, CAPTIONS[:2])
    positions = [
        TokenPosition(row, batch.caption_start[row] + index - 1, batch.tokens[row][index], "dog", f"s{row}")
        for row in range(2)
        for index in range(2)
    ]
    with torch.inference_mode(), cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    return model, cache


def test_shares_are_each_neurons_write_over_the_output(seen):
    model, cache = seen
    for layer, found in enumerate(quantities(model, cache)):
        rows = output_rows(model.network, model.projections[layer]).float()
        written = cache.activations[layer][:, :, None] * rows
        output = written.sum(dim=1)
        expected = written.norm(dim=2) / output.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found["share"], expected, rtol=1e-3, atol=1e-5)


def test_contributions_are_the_slope_of_the_log_odds(seen):
    """More of a layer's output raises the log-odds by the sum of contributions, with the norm's scale fixed."""
    model, cache = seen
    little = 1e-3
    head = model.network.get_submodule(model.parts.unembedding)
    for layer, found in enumerate(quantities(model, cache)):
        projection = model.projections[layer]
        written = cache.activations[layer] @ output_rows(model.network, projection).float() * projection.scale
        scale = (cache.hidden.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt()
        normed = written * scale * model.norm.weight
        logits = [head(model.norm(cache.hidden) + sign * little * normed) for sign in (1, -1)]
        own = cache.tokens[:, None]
        more, less = (one.gather(1, own)[:, 0] - one.scatter(1, own, -torch.inf).logsumexp(dim=1) for one in logits)
        expected = (more - less) / (2 * little)
        torch.testing.assert_close(found["contribution"].sum(dim=1), expected, rtol=1e-2, atol=1e-3)


def test_two_thirds_of_images_are_for_fitting_and_a_seed_draws_others():
    first, second = ([fold_of(f"image {number}", seed) for number in range(900)] for seed in (0, 1))
    assert first.count(FIT) + first.count(TEST) == 900
    assert 540 < first.count(FIT) < 660
    assert first != second
