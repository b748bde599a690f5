"""Probabilities and folded norms are those of the network's own logits, capped and scaled ones too."""

import pytest
import torch
from torch.nn import functional

from mmray.models import norms
from mmray.models.capture import capture_input
from mmray.models.norms import (
    fold_norm,
    lens,
    log_odds_slope,
    log_probability,
    norm_curvature,
    token_log_odds,
    token_logits,
    without_norms,
)
from mmray.models.parts import gain_of, output_rows, unembedding_rows
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import CAPTIONS, batch_of

UNUSUAL = {
    "capped": ("paligemma", {"model_type": "gemma2", "final_logit_softcapping": 3.0}),
    "scaled": ("blip2_t5", {"scale_decoder_outputs": True}),
}
"""Logits as cap · tanh(logit / cap), in Gemma 2; states times width ** -0.5, in the first T5."""


HEADS = ("blip", "vision-encoder-decoder with bert")
"""Types with a transform between the final norm and the unembedding."""


@pytest.fixture
def ends(open_model, open_type, loaded_with):
    """Return the model, the final norm's inputs at the caption's places, the next tokens, and the logits there."""

    def run(name):
        if name in UNUSUAL:
            model = loaded_with(UNUSUAL[name][0], **UNUSUAL[name][1])
        else:
            model = (open_type if name in HEADS else open_model)(name)
        batch, _ = batch_of(model, CAPTIONS[:2])
        states = []
        with torch.inference_mode(), capture_input(model.norm, states.append):
            logits = model.network(**batch.to(model.device, model.network.dtype)).logits
        places = [
            (row, batch.caption_start[row] + index - 1) for row in (0, 1) for index in range(len(batch.tokens[row]))
        ]
        rows, positions = zip(*places, strict=True)
        tokens = torch.tensor(batch.tokens[0] + batch.tokens[1])
        return model, states[0][rows, positions], tokens, logits[rows, positions]

    return run


@pytest.mark.parametrize("name", [*VARIANTS, *UNUSUAL, *HEADS])
def test_log_probability_is_the_network_s(ends, name):
    model, states, tokens, logits = ends(name)
    expected = logits.float().log_softmax(1)[range(len(tokens)), tokens]
    torch.testing.assert_close(log_probability(model, states, tokens), expected, rtol=1e-5, atol=1e-5)
    chosen = logits[range(len(tokens)), tokens]
    torch.testing.assert_close(token_logits(model, states, tokens), chosen, rtol=1e-5, atol=1e-5)
    assert log_probability(model, states[:0], tokens[:0]).shape == (0,)


def test_caps_and_scales_are_in_these_logits(ends):
    assert 2.5 < ends("capped")[3].abs().max() <= 3
    model, states, tokens, logits = ends("scaled")
    unscaled = (model.norm(states) * unembedding_rows(model.network, model.parts)[tokens]).sum(1)
    torch.testing.assert_close(logits[range(len(tokens)), tokens], unscaled * 32**-0.5)


@pytest.mark.parametrize("name", [*VARIANTS, "scaled"])
def test_folded_direction_is_the_norm_s_slope(ends, name):
    model, states, tokens, _ = ends(name)
    states, unembedding = states.double(), unembedding_rows(model.network, model.parts)[tokens]
    folded = fold_norm(model, states.float(), unembedding).double()
    step = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # A step that leaves the scale as it is stands at right angles to the state, and to 1 where the norm centres.
    centred = states - states.mean(1, keepdim=True) if isinstance(model.norm, torch.nn.LayerNorm) else states
    step = step - step.mean(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    step = step - (step * centred).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True) * centred
    step = 1e-3 * step * states.norm(dim=1, keepdim=True) / step.norm(dim=1, keepdim=True)
    before, after = (token_logits(model, (states + sign * step).float(), tokens).double() for sign in (-1, 1))
    torch.testing.assert_close((after - before) / 2, (step * folded).sum(1), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_shares_through_a_transform_add_up_to_the_logit(ends, name):
    """BERT's head, written down: with gates and scales as they are at a state, logits are linear in what is written."""
    model, states, tokens, logits = ends(name)
    unembedding = unembedding_rows(model.network, model.parts)[tokens]
    transform = next(module for path, module in model.network.named_modules() if path.endswith("predictions.transform"))
    dense, last, head = transform.dense, transform.LayerNorm, model.network.get_submodule(model.parts.unembedding)

    def layer_norm(norm, values, at):
        scale = (at.var(1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
        return (values - values.mean(1, keepdim=True)) * scale * norm.weight + norm.bias

    def end(values, at):
        z, fixed = (dense(layer_norm(model.norm, one, at)) for one in (values, at))
        gate = transform.transform_act_fn(fixed) / fixed
        out = layer_norm(last, z * gate, fixed * gate)
        return (out * unembedding).sum(1) + head.bias[tokens]

    torch.testing.assert_close(end(states, states), logits[range(len(tokens)), tokens], rtol=1e-4, atol=1e-4)
    write = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    share = (write * fold_norm(model, states, unembedding)).sum(1)
    torch.testing.assert_close(end(states + write, states) - end(states, states), share, rtol=1e-4, atol=1e-4)
    # Without norms, only the Linear and the gates are left.
    normed = model.norm(states)
    gate = transform.transform_act_fn(dense(normed)) / dense(normed)
    share = (write * without_norms(model, states, unembedding)).sum(1)
    torch.testing.assert_close(share, (write @ dense.weight.T * gate * unembedding).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (write @ lens(model).T)[range(len(tokens)), tokens], (write @ dense.weight.T * unembedding).sum(1)
    )


@pytest.mark.parametrize("name", [*VARIANTS, *UNUSUAL, *HEADS])
def test_the_slope_is_the_gradient_of_the_log_odds(ends, monkeypatch, name):
    # The vocabulary is gone through in parts, the last of them smaller.
    monkeypatch.setattr(norms, "TOKENS", 7)
    model, states, tokens, _ = ends(name)
    slope = log_odds_slope(model, states, tokens)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = states.clone().requires_grad_()
        (expected,) = torch.autograd.grad(token_log_odds(model, leaf, tokens).sum(), leaf)
        again = states.clone().requires_grad_()
        (through,) = torch.autograd.grad((end_of(model)(again) * slope.clone()).sum(), again)
    torch.testing.assert_close(through, expected, rtol=1e-4, atol=1e-6)


def end_of(model):
    """Return the function from the final norm's input to what is unembedded, without the logits' scale."""
    return model.norm if model.transform is None else lambda state: model.transform.module(model.norm(state))


@pytest.mark.parametrize("name", [*VARIANTS, *UNUSUAL, *HEADS])
def test_curvature_is_what_first_order_leaves_of_the_norm(ends, name):
    """Each neuron's write is taken from the norm's input by itself, and the norm run again."""
    model, states, tokens, _ = ends(name)
    projection = model.projections[-1]
    random = torch.Generator().manual_seed(0)
    activation = 30 * torch.randn(len(tokens), 5, generator=random)
    slope = torch.randn(states.shape, generator=random)
    rows = output_rows(model.network, projection)
    before = torch.randn(states.shape, generator=random) if projection.post_norm else None
    held = fold_block_by_hand(model, projection, before)
    found = norm_curvature(
        model, projection, states, before, slope, functional.pad(activation, (0, len(rows) - activation.shape[1]))
    )
    if model.transform is not None:
        # It is linear where it is, as first order has it.
        with torch.inference_mode(False), torch.enable_grad():
            normed = model.norm(states.clone()).detach().requires_grad_()
            (slope,) = torch.autograd.grad((model.transform.module(normed) * slope).sum(), normed)
    for neuron in range(activation.shape[1]):
        write = activation[:, neuron, None] * rows[neuron].float() * held
        with torch.inference_mode(False):
            given = (states.double().clone(), write.double().clone())
            of_norm = lambda state: (exact_norm(model.norm, state) * slope.double()).sum(1)  # noqa: E731
            _, first = torch.func.jvp(of_norm, (given[0],), (given[1],))
            expected = of_norm(given[0]) - of_norm(given[0] - given[1]) - first
        torch.testing.assert_close(found[:, neuron].double(), expected, rtol=1e-3, atol=1e-4)


def fold_block_by_hand(model, projection, written):
    """Return what each coordinate of a write is multiplied by before it reaches the residual stream."""
    if projection.post_norm is None:
        return projection.scale
    norm = model.network.get_submodule(projection.post_norm)
    return projection.scale * norm(written) / written


def exact_norm(norm, states):
    """Return the norm in fp64, from its definition."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if isinstance(norm, torch.nn.LayerNorm):
        return functional.layer_norm(states, states.shape[-1:], norm.weight.double(), norm.bias.double(), epsilon)
    return states * (states.square().mean(1, keepdim=True) + epsilon).rsqrt() * gain_of(norm).double()
