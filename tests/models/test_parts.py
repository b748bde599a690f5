"""Every family's parts are found, and what is found does what the scores take it to do."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from mmray.models.parts import gain_of, locate, output_rows, set_output_rows, unembedding_rows
from mmray.models.probe import probe
from mmray.models.tiny.variants import VARIANTS

# Language: neurons a layer, gated. Vision: MLPs, neurons, gated. Projector: MLPs, neurons.
EXPECTED = {
    "llava": ((48, True), (2, 40, False), (1, 32)),
    "llava_next": ((48, True), (2, 40, False), (1, 32)),
    "llava_onevision": ((48, True), (2, 40, False), (1, 32)),
    "vipllava": ((48, True), (2, 40, False), (1, 32)),
    "qwen2_vl": ((48, True), (2, 64, False), (1, 128)),
    "qwen2_5_vl": ((48, True), (2, 40, True), (1, 128)),
    "qwen3_vl": ((48, True), (2, 40, False), (2, 128)),
    "qwen3_vl_moe": ((96, False), (2, 40, False), (2, 128)),
    "paligemma": ((48, True), (2, 40, False), (0, 0)),
    "gemma3": ((48, True), (2, 40, False), (0, 0)),
    "internvl": ((48, True), (2, 40, False), (1, 32)),
    "idefics3": ((48, True), (2, 40, False), (0, 0)),
    "smolvlm": ((48, True), (2, 40, False), (0, 0)),
    "instructblip_vicuna": ((48, True), (2, 40, False), (4, 40)),
    "instructblip_t5": ((48, True), (2, 40, False), (4, 40)),
    "blip2_opt": ((48, False), (2, 40, False), (2, 40)),
    "blip2_t5": ((48, True), (2, 40, False), (2, 40)),
    "mllama": ((48, True), (3, 40, False), (0, 0)),
}


def capture(network, projections, inputs):
    """Return (activation, output) of each projection, rows of tokens, and the logits, in one forward."""
    seen: dict[str, list[torch.Tensor]] = {projection.path: [] for projection in projections}
    handles = []
    for projection in projections:
        module, rows = network.get_submodule(projection.path), seen[projection.path]
        if not projection.experts:
            handles.append(module.register_forward_pre_hook(lambda _, a, rows=rows: rows.append(a[0].flatten(0, -2))))
        handles.append(module.register_forward_hook(lambda _, __, out, rows=rows: rows.append(out.flatten(0, -2))))
    try:
        return seen, network(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_finds_every_part(loaded, variant):
    network = loaded(variant).network
    parts = locate(network)
    (width, gated), vision, projector = EXPECTED[variant]
    assert parts.family == network.config.model_type
    assert [(p.layer, p.width, p.gate is not None) for p in parts.of("language")] == [(n, width, gated) for n in (0, 1)]
    assert [(p.layer, p.width, p.gate is not None) for p in parts.of("vision")] == [
        (n, *vision[1:]) for n in range(vision[0])
    ]
    assert [(p.layer, p.width) for p in parts.of("projector")] == [(n, projector[1]) for n in range(projector[0])]
    assert parts.projections == parts.of("language") + parts.of("vision") + parts.of("projector")
    assert len({projection.path for projection in parts.projections}) == len(parts.projections)
    assert parts.encoder_decoder == variant.endswith("t5")
    assert parts.image == ("cross-attention" if variant == "mllama" else "tokens")


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_token_stands_in_the_inputs(loaded, variant):
    model = loaded(variant)
    count = int((model.inputs["input_ids"] == locate(model.network).image_token_id).sum())
    assert count == 1 if variant == "mllama" else count >= 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_times_rows_is_the_output(loaded, variant):
    model = loaded(variant)
    linears = [projection for projection in locate(model.network).projections if not projection.experts]
    seen, _ = capture(model.network, linears, model.inputs)
    for projection in linears:
        activation, output = seen[projection.path]
        bias = model.network.get_submodule(projection.path).bias
        sums = activation @ output_rows(model.network, projection)
        torch.testing.assert_close(sums + bias if bias is not None else sums, output, rtol=1e-5, atol=1e-5)
        assert activation.shape[-1] == projection.width
        assert activation.std() > 0.01
        assert (
            output_rows(model.network, projection).data_ptr()
            == model.network.get_submodule(projection.path).weight.data_ptr()
        )


@pytest.mark.parametrize("variant", ["llava", "blip2_t5"])
def test_rows_are_written_and_put_back(loaded, variant):
    network = loaded(variant).network
    projection = locate(network).of("language")[1]
    weight = network.get_submodule(projection.path).weight
    before, units = weight.clone(), torch.tensor([3, 7])
    rows = output_rows(network, projection)[units].clone()
    set_output_rows(network, projection, units, rows + 1)
    torch.testing.assert_close(weight - before, torch.zeros_like(before).index_fill(1, units, 1.0))
    set_output_rows(network, projection, units, rows)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_normed_state_on_the_unembedding(loaded, variant):
    model = loaded(variant)
    parts = locate(model.network)
    states = []
    handle = model.network.get_submodule(parts.final_norm).register_forward_hook(lambda *call: states.append(call[2]))
    logits = model.network(**model.inputs).logits
    handle.remove()
    torch.testing.assert_close(states[-1] * parts.logit_scale @ unembedding_rows(model.network, parts).T, logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gain_is_what_the_norm_multiplies_by(loaded, variant):
    network = loaded(variant).network
    parts = locate(network)
    norm, state = (
        network.get_submodule(parts.final_norm),
        torch.randn(5, 32, generator=torch.Generator().manual_seed(0)),
    )
    normed = state - state.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else state
    normed = normed / normed.square().mean(-1, keepdim=True).sqrt()
    bias = getattr(norm, "bias", None)
    expected = norm(state) if bias is None else norm(state) - bias
    torch.testing.assert_close(normed * gain_of(norm), expected, rtol=1e-4, atol=1e-4)


def test_scaled_and_capped_logits_are_recorded(loaded):
    scaled = loaded("blip2_t5").variation(scale_decoder_outputs=True)
    assert locate(scaled).logit_scale == pytest.approx(32**-0.5)
    assert probe(scaled).logit_scale == pytest.approx(32**-0.5)
    capped = loaded("paligemma").variation(model_type="gemma2", final_logit_softcapping=30.0)
    assert locate(capped).logit_cap == 30.0


def test_cross_attention_blocks_weigh_their_mlp(loaded):
    model = loaded("mllama")
    plain, crossed = locate(model.network).of("language")
    block = model.network.model.language_model.layers[1]
    assert plain.scale == 1
    assert crossed.scale == pytest.approx(block.cross_attn_mlp_gate.tanh().item())
    outputs = []
    with ExitStack() as hooks:
        hooks.callback(block.register_forward_hook(lambda *call: outputs.append(call[2])).remove)
        model.network(**model.inputs)
        projection = model.network.get_submodule(crossed.path)
        hooks.callback(projection.register_forward_hook(lambda *call: call[2] + 1).remove)
        model.network(**model.inputs)
    torch.testing.assert_close(outputs[1][0, -1] - outputs[0][0, -1], torch.full((32,), crossed.scale))
    # Tokens before the image do not see it, and the block adds nothing of its MLP to them.
    assert torch.equal(outputs[1][0, 0], outputs[0][0, 0])


@pytest.mark.parametrize("variant", ["idefics3", "smolvlm"])
def test_a_tower_by_the_name_of_older_checkpoints_is_found(loaded_with, open_model, variant):
    model = loaded_with(variant)
    model.network.config.vision_config.model_type = variant
    assert locate(model.network).of("vision") == open_model(variant).parts.of("vision") != ()
