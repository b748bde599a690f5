"""A decoder of several streams: shares with its weights fixed add up to the logit, and every use knows the streams."""

from contextlib import ExitStack

import pytest
import torch

from mmray.features.saliency.saliency_input import SequenceInput
from mmray.features.selectivity.logit_lens import Lens
from mmray.models import streams
from mmray.models.blocks import block_of, permuted_image
from mmray.models.capture import capture_input, gate_function
from mmray.models.interventions import changed_rows
from mmray.models.norms import fold_norm, token_logits
from mmray.models.parts import output_rows, unembedding_rows
from mmray.models.processing import noise_image
from mmray.models.streams import by_token, in_streams
from mmray.models.tiny.catalogue import CATALOGUE
from mmray.neurons.activation_cache import cache_activations, forward
from mmray.neurons.scoring import score_batch
from mmray.neurons.token_positions import positions_of
from mmray.neurons.validation import CAPTIONS, NOUNS, claims_of, example, identity, streams_mixed


@pytest.fixture(scope="module")
def model(open_text_model):
    return open_text_model("gemma3n_text")


def located(model, captions):
    """Return the batch of these captions, and where their nouns are predicted."""
    batch = example(model, captions)
    return batch, positions_of(batch, [("", NOUNS.find(caption, "en", None)) for caption in captions])


def frozen(stack, model):
    """Let nothing depend on the streams but the streams: routers, attention, MLPs, embeddings and magnitudes."""
    detach = lambda _, __, output: output.detach()  # noqa: E731
    for path, module in model.network.named_modules():
        parts = ("_coefs", "post_attention_layernorm", ".laurel", "post_feedforward_layernorm", "per_layer_input_norm")
        if path.endswith(parts):
            stack.callback(module.register_forward_hook(detach).remove)
    mean = torch.mean

    def fixed(values, dim=None, keepdim=False):
        found = mean(values, dim=dim, keepdim=keepdim)
        # The mean of all streams is over the first dimension; that of squares, over the last one.
        return found.detach() if dim == -1 else found

    stack.enter_context(pytest.MonkeyPatch.context()).setattr(torch, "mean", fixed)


def test_folded_directions_are_the_slope_with_all_weights_fixed(model):
    """Autograd, with everything cut off that is held fixed, gives the same directions."""
    batch, positions = located(model, CAPTIONS)
    with cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    final = torch.randn(cache.hidden.shape, generator=torch.Generator().manual_seed(0))
    found = cache.mix.by_layer(final)
    assert len(found) == len(model.widths)
    rows = [position.row * batch.positions + position.position for position in positions]
    for layer, projection in enumerate(model.projections):
        leaves, ends = [], []
        norm = model.network.get_submodule(projection.post_norm)
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            frozen(stack, model)

            def leaf(_, __, output, leaves=leaves):
                leaves.append(output.detach().clone().requires_grad_())
                return leaves[-1]

            stack.callback(norm.register_forward_hook(leaf).remove)
            stack.enter_context(capture_input(model.norm, ends.append))
            forward(model, batch)
            value = (ends[0].flatten(0, 1)[rows] * final).sum()
            (expected,) = torch.autograd.grad(value, leaves)
        torch.testing.assert_close(found[layer], expected.flatten(0, 1)[rows], rtol=1e-4, atol=1e-5)


def test_folded_scores_add_up_to_what_the_mlp_gives(model):
    batch, positions = located(model, CAPTIONS[:1])
    written = {}
    with ExitStack() as stack:
        for layer, projection in enumerate(model.projections):
            norm = model.network.get_submodule(projection.post_norm)
            keep = lambda _, __, output, layer=layer: written.update({layer: output.flatten(0, -2)})  # noqa: E731
            stack.callback(norm.register_forward_hook(keep).remove)
        cache = stack.enter_context(cache_activations(model, batch, positions))
        forward(model, batch)
    final = fold_norm(model, cache.hidden, unembedding_rows(model.network, model.parts)[cache.tokens])
    scores = score_batch(model, batch, positions, folded=True).scores
    rows = [position.row * batch.positions + position.position for position in positions]
    for layer, direction in enumerate(cache.mix.by_layer(final)):
        expected = (written[layer][rows] * direction).sum(1)
        torch.testing.assert_close(scores[layer].sum(1), expected, rtol=1e-4, atol=1e-5)


def test_unfolded_scores_are_the_mlp_s_own_output(model):
    """As in other families with a norm after the MLP: Σ contributions = its own output · unembedding."""
    passed, detail = identity(model)
    assert passed, detail
    assert float(detail.split()[3]) < 1e-5


def test_activations_are_those_after_the_sparsity(model):
    """The first layer's gate keeps what is above a cutoff; what is dropped is no activation."""
    assert model.network.config.activation_sparsity_pattern[0] > 0
    batch, positions = located(model, CAPTIONS[:1])
    with cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    for layer, projection in enumerate(model.projections):
        gate = gate_function(model.network, projection)(cache.gate[layer])
        assert torch.equal(gate == 0, cache.activations[layer] == 0)
    silent = [(cache.activations[layer] == 0).float().mean() for layer in (0, 1)]
    assert silent[0] > 0.3
    assert silent[1] == 0


@pytest.mark.parametrize("broken", [None, "residual", "active"])
def test_the_claim_fails_for_other_weights(model, monkeypatch, broken):
    assert streams_mixed in claims_of(model).values()
    if broken == "residual":
        monkeypatch.setattr(streams, "RESIDUAL", 1.0)
    if broken == "active":
        monkeypatch.setattr(model.streams, "active", 1)
    assert streams_mixed(model)[0] == (broken is None)


def test_other_models_have_no_such_claim(open_model):
    assert streams_mixed not in claims_of(open_model("gemma3")).values()
    assert open_model("gemma3").streams is None


def test_merged_streams_are_what_the_final_norm_gets(model):
    batch, _ = located(model, CAPTIONS)
    last, final = [], []
    block = block_of(model, len(model.widths) - 1)
    with (
        block.register_forward_hook(lambda _, __, output: last.append(output)),
        capture_input(model.norm, final.append),
    ):
        forward(model, batch)
    torch.testing.assert_close(model.streams.merge(last[0]), final[0])


def test_tokens_are_moved_with_all_their_streams():
    states = torch.randn(4, 2, 5, 3)
    tokens = by_token(states)
    assert tokens.shape == (2, 5, 12)
    assert torch.equal(tokens[1, 2], states[:, 1, 2].flatten())
    assert torch.equal(in_streams(tokens, states), states)
    one = states[0]
    assert by_token(one) is one
    assert in_streams(one, one) is one


def test_a_planted_neuron_is_found_first(model):
    batch, positions = located(model, CAPTIONS[:1])
    target = positions[0].token
    unit, layer = 7, 1
    rows = output_rows(model.network, model.projections[layer])
    word = unembedding_rows(model.network, model.parts)[target]
    with cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    sign = cache.activations[layer][0, unit].sign()
    planted = 30 * sign * word / word.norm() * rows.norm(dim=1).max()
    for folded in (False, True):
        with changed_rows(model, layer, [unit], planted[None]):
            scores = torch.cat([part[0] for part in score_batch(model, batch, positions, folded=folded).scores])
        assert int(scores.argmax()) == model.widths[0] + unit


def test_the_logit_lens_reads_all_streams(model):
    """Of the last block, it is the network's own end."""
    batch, positions = located(model, CAPTIONS)
    rows = torch.tensor([position.row * batch.positions + position.position for position in positions])
    with cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    found = Lens(model, [])._states(batch, {"text": rows})["text"]
    assert len(found) == len(model.widths)
    torch.testing.assert_close(found[-1], cache.hidden)


@pytest.mark.skipif(bool(CATALOGUE["gemma3n"].lacks), reason="timm is not installed")
def test_saliency_and_shuffled_images_move_tokens_with_all_their_streams(open_type):
    model = open_type("gemma3n")
    batch, positions = located(model, CAPTIONS)
    given = SequenceInput(model, batch, positions, [noise_image().size] * len(CAPTIONS))
    with cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    expected = token_logits(model, cache.hidden, cache.tokens)
    torch.testing.assert_close(given.at_targets(given.features, positions, token_logits), expected)
    with cache_activations(model, batch, positions) as shuffled, permuted_image(model, batch):
        forward(model, batch)
    assert (shuffled.hidden - cache.hidden).abs().max() > 1e-3
