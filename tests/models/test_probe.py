"""The structural probe finds the parts by what they do, in families that the table knows and in others."""

import pytest
import torch
import transformers
from torch import nn

from mmray.errors import InputError
from mmray.models.parts import locate
from mmray.models.probe import probe
from mmray.models.tiny.variants import VARIANTS

UNPROBED = {"mllama": "no list of blocks"}
"""Families that only the table knows: blocks that text alone does not run."""


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


LINEAR_ATTENTION = {
    f"linear_{name}": size
    for name, size in {"key_head_dim": 8, "value_head_dim": 32, "num_key_heads": 2, "num_value_heads": 2}.items()
}
# Gate and factor in one Linear; a norm after the MLP; a weighed MLP; attention and MLP side by side; neither gated.
UNKNOWN = {
    "phi3": ({"num_key_value_heads": 2}, "mlp.down_proj", ("mlp.gate_up_proj", True, None, 1.0)),
    "olmo2": ({}, "mlp.down_proj", ("mlp.gate_proj", False, "post_feedforward_layernorm", 1.0)),
    "granite": ({"residual_multiplier": 0.22}, "mlp.down_proj", ("mlp.gate_proj", False, None, 0.22)),
    "gpt_neox": ({}, "mlp.dense_4h_to_h", (None, False, None, 1.0)),
    "starcoder2": ({}, "mlp.c_proj", (None, False, None, 1.0)),
    # Vectors of each token are gated by the hidden states, which an MLP's output projection is too.
    "gemma4_text": (
        {"num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400},
        "mlp.down_proj",
        ("mlp.gate_proj", False, "post_feedforward_layernorm", 1.0),
    ),
    # Its attention without softmax is gated, which an MLP's output projection is too.
    "qwen3_5_text": (LINEAR_ATTENTION, "mlp.down_proj", ("mlp.gate_proj", False, None, 1.0)),
}


# Gemma 4 finds tokens by their embeddings, which needs fp32.
@pytest.mark.parametrize(
    ("decoder", "dtype"),
    [(decoder, torch.float32) for decoder in UNKNOWN]
    + [(decoder, torch.bfloat16) for decoder in UNKNOWN if decoder != "gemma4_text"],
)
def test_decoders_of_many_kinds_are_probed(loaded, decoder, dtype):
    settings, path, facts = UNKNOWN[decoder]
    torch.manual_seed(0)
    network = loaded("llava").variation(dtype, model_type=decoder, **settings)
    for weight in network.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    # Not `locate`: the table knows some of them.
    parts = probe(network.train())
    assert network.training
    assert parts.family == "probed"
    for layer, found in enumerate(parts.of("language")):
        block = f"model.language_model.layers.{layer}"
        gate, fused, norm, scale = facts
        assert (found.path, found.layer, found.width) == (f"{block}.{path}", layer, 48)
        assert (found.gate, found.gate_fused) == (gate and f"{block}.{gate}", fused)
        assert found.post_norm == (norm and f"{block}.{norm}")
        assert found.scale == pytest.approx(scale, rel=0.02)


@pytest.mark.parametrize("decoder", ["olmo2", "starcoder2"])
def test_an_mlp_narrower_than_what_it_writes_is_found(loaded, decoder):
    torch.manual_seed(0)
    network = loaded("llava").variation(model_type=decoder, intermediate_size=24)
    for weight in network.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    assert [found.width for found in probe(network).of("language")] == [24, 24]


# Next to the MLP that the probe finds, something else writes: experts of another kind, or one token's own vector.
PARTIAL = {
    "granitemoeshared": ({"num_local_experts": 4, "shared_intermediate_size": 56}, "experts of .* of an unknown kind"),
}
CASES = [(decoder, dtype) for decoder in PARTIAL for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("decoder", "dtype"), CASES)
def test_a_part_of_what_a_block_writes_is_refused(loaded, decoder, dtype):
    torch.manual_seed(0)
    settings, problem = PARTIAL[decoder]
    network = loaded("llava").variation(dtype, model_type=decoder, **settings)
    for weight in network.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    with pytest.raises(InputError, match=problem) as refusal:
        locate(network)
    assert "\n" not in str(refusal.value)


# Of a large residual stream, what a block adds is a thousandth.
@pytest.mark.parametrize("stream", [1, 1e4])
def test_an_adapter_next_to_the_mlp_is_refused(loaded, stream):
    # It is fed and added as an MLP is, but narrower than what it writes.
    network = loaded("llava").variation(model_type="starcoder2")
    network.get_input_embeddings().weight.data *= stream
    for block in network.model.language_model.layers:
        block.adapter = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
        block.register_forward_hook(lambda block, given, output: output + block.adapter(given[0]))
    with pytest.raises(InputError, match="writes more than its attention"):
        probe(network)


def test_parallel_streams_are_refused(loaded):
    # Gemma 3n: the last blocks' four streams are projected, scaled and averaged before the final norm.
    settings = {"num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    settings |= {
        "vocab_size_per_layer_input": 400,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
    }
    network = loaded("llava").variation(model_type="gemma3n_text", intermediate_size=[48, 48], **settings)
    with pytest.raises(
        InputError, match=r"its blocks pass on 4 streams, which are mixed before model\.language_model\.norm"
    ):
        probe(network)


def test_moved_parts_are_probed(loaded):
    network = loaded("llava").variation()
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


def test_a_model_without_image_tokens_is_refused(loaded):
    network = loaded("llava").variation()
    network.config.image_token_id = None
    with pytest.raises(InputError, match="llava: no image_token_id"):
        probe(network)
