"""Every family's parts are found, and what is found does what the scores take it to do."""

from contextlib import ExitStack

import pytest
import torch
import transformers
from torch import nn

from mmray.errors import InputError
from mmray.models.experts import routed_activation
from mmray.models.parts import locate, norm_gain, output_rows, unembedding_rows
from mmray.models.probe import probe
from tests.models.tiny import VARIANTS

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
COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "pad_token_id")
"""Settings that every decoder's configuration has."""
UNPROBED = {"mllama": "no list of blocks", "qwen3_vl_moe": "found none"}
"""Families that only the table knows: blocks that text alone does not run, and experts without a Linear."""


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


def variation(model, dtype=torch.float32, **settings):
    """Return an untrained network of the same family whose decoder's configuration differs in these settings."""
    config = model.network.config.to_dict()
    if "model_type" in settings:
        config["text_config"] = {name: config["text_config"][name] for name in COMMON}
    config["text_config"] |= settings
    return transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(**config), dtype=dtype
    )


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


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_activation_times_rows_is_the_experts_output(loaded, implementation):
    model = loaded("qwen3_vl_moe")
    projections = locate(model.network).of("language")
    model.network.set_experts_implementation(implementation)
    plain = model.network(**model.inputs).logits
    for projection in projections:
        received = []
        with routed_activation(model.network.get_submodule(projection.path), received.append):
            seen, logits = capture(model.network, [projection], model.inputs)
        (activation,) = received
        torch.testing.assert_close(
            activation @ output_rows(model.network, projection), seen[projection.path][0], rtol=1e-5, atol=1e-5
        )
        # Two of four experts see a token; the other two's units are exactly zero.
        by_expert = activation.unflatten(1, (projection.experts, -1))
        assert by_expert.any(-1).sum(-1).eq(2).all()
        assert torch.equal(logits, plain)


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
def test_norm_gain_is_what_the_norm_multiplies_by(loaded, variant):
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
    torch.testing.assert_close(normed * norm_gain(network, parts), expected, rtol=1e-4, atol=1e-4)


def test_scaled_and_capped_logits_are_recorded(loaded):
    scaled = variation(loaded("blip2_t5"), scale_decoder_outputs=True)
    assert locate(scaled).logit_scale == pytest.approx(32**-0.5)
    assert probe(scaled).logit_scale == pytest.approx(32**-0.5)
    capped = variation(loaded("paligemma"), model_type="gemma2", final_logit_softcapping=30.0)
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


def test_blocks_without_experts_among_blocks_with(loaded):
    first, second = locate(variation(loaded("qwen3_vl_moe"), mlp_only_layers=[1])).of("language")
    assert (first.experts, first.width, first.gate) == (4, 96, None)
    assert (second.experts, second.width) == (0, 48)
    assert second.gate.endswith("layers.1.mlp.gate_proj")


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in UNPROBED])
def test_probe_agrees_with_the_table(loaded, variant):
    network = loaded(variant).network
    hooks = _hooks(network)
    table, found = locate(network), probe(network)
    assert found.family == "probed"
    assert found.projections == table.of("language")
    for fact in ("final_norm", "unembedding", "image_token_id", "encoder_decoder", "logit_scale", "logit_cap"):
        assert getattr(found, fact) == getattr(table, fact)
    assert _hooks(network) == hooks


def _hooks(network):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]


@pytest.mark.parametrize("variant", UNPROBED)
def test_probe_says_what_it_did_not_find(loaded, variant):
    with pytest.raises(InputError, match=UNPROBED[variant]) as refusal:
        probe(loaded(variant).network)
    assert "\n" not in str(refusal.value)


# Gate and factor in one Linear; a norm after the MLP; a weighed MLP; attention and MLP side by side; neither gated.
UNKNOWN = {
    "phi3": ({"num_key_value_heads": 2}, "mlp.down_proj", ("mlp.gate_up_proj", True, None, 1.0)),
    "olmo2": ({}, "mlp.down_proj", ("mlp.gate_proj", False, "post_feedforward_layernorm", 1.0)),
    "granite": ({"residual_multiplier": 0.22}, "mlp.down_proj", ("mlp.gate_proj", False, None, 0.22)),
    "gpt_neox": ({}, "mlp.dense_4h_to_h", (None, False, None, 1.0)),
    "starcoder2": ({}, "mlp.c_proj", (None, False, None, 1.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", UNKNOWN)
def test_decoders_outside_the_table_are_probed(loaded, decoder, dtype):
    settings, path, facts = UNKNOWN[decoder]
    torch.manual_seed(0)
    network = variation(loaded("llava"), dtype, model_type=decoder, **settings)
    for weight in network.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    parts = locate(network.train())
    assert network.training
    assert parts.family == "probed"
    for layer, found in enumerate(parts.of("language")):
        block = f"model.language_model.layers.{layer}"
        gate, fused, norm, scale = facts
        assert (found.path, found.layer, found.width) == (f"{block}.{path}", layer, 48)
        assert (found.gate, found.gate_fused) == (gate and f"{block}.{gate}", fused)
        assert found.post_norm == (norm and f"{block}.{norm}")
        assert found.scale == pytest.approx(scale, rel=0.02)


def test_moved_parts_are_probed(loaded):
    network = variation(loaded("llava"))
    decoder = network.model.language_model
    decoder.stages = decoder.layers
    del decoder.layers
    decoder.forward = _forward_over_stages(decoder)
    parts = locate(network)
    assert parts.family == "probed"
    assert [found.path for found in parts.projections] == [
        f"model.language_model.stages.{layer}.mlp.down_proj" for layer in (0, 1)
    ]


def _forward_over_stages(decoder):
    """A decoder as another version of the library might have it: the same blocks under another name."""

    def forward(inputs_embeds, attention_mask, **_):
        states, places = inputs_embeds, torch.arange(inputs_embeds.shape[1])[None]
        for stage in decoder.stages:
            states = stage(states, position_embeddings=decoder.rotary_emb(states, places), attention_mask=None)
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=decoder.norm(states))

    return forward


def test_a_model_without_image_tokens_is_refused():
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=64
    )
    with pytest.raises(InputError, match="llama: no image_token_id"):
        locate(transformers.LlamaForCausalLM(config))
