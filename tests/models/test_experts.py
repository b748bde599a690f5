"""The neurons of experts are read, changed and written as those of an ordinary MLP are."""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mmray.features.census.model_check import check_model
from mmray.features.editing.deltas import Deltas
from mmray.models.blocks import block_output
from mmray.models.capture import capture_activations, gate_function
from mmray.models.experts import Experts, routed_experts
from mmray.models.interventions import ablate, scale
from mmray.models.norms import token_log_odds
from mmray.models.parts import locate, output_rows, set_output_rows, unembedding_rows
from mmray.models.tiny.checkpoints import randomise
from mmray.neuron_names import NeuronNames
from mmray.neurons.activation_cache import cache_activations, forward
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.model import load_model
from mmray.neurons.token_positions import positions_of
from mmray.neurons.validation import CAPTIONS, NOUNS, example, identity
from tests.support.samples import picture

HEADS = {"num_key_value_heads": 2, "head_dim": 8}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
SHARED = ROUTED | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LINEAR_ATTENTION = {
    f"linear_{name}": size
    for name, size in {"key_head_dim": 8, "value_head_dim": 32, "num_key_heads": 2, "num_value_heads": 2}.items()
}
OWN = {"num_experts": 4, "shared_expert_intermediate_size": 56}
DECODERS = {
    "mixtral": (HEADS | {"num_local_experts": 4}, [192, 192]),
    "qwen3_moe": (HEADS | ROUTED | {"num_experts": 4}, [160, 160]),
    # The first layer is dense.
    "glm4_moe": (HEADS | SHARED | {"first_k_dense_replace": 1}, [48, 200]),
    # Experts narrower than the hidden size, as in the large models.
    "dots1": (HEADS | SHARED | {"first_k_dense_replace": 1, "moe_intermediate_size": 24}, [48, 120]),
    "ernie4_5_moe": (
        HEADS
        | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 40, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1},
        [48, 200],
    ),
    # Weights are stored transposed.
    "aria_text": ({"moe_num_experts": 4, "moe_topk": 2}, [288, 288]),
    # What the routed experts write has a factor of its own, and their gate is clamped.
    "minimax_m3_vl_text": (
        HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 56,
            "routed_scaling_factor": 2.5,
        }
        | {"mlp_layer_types": ["sparse", "sparse"], "layer_types": ["full_attention"] * 2},
        [248, 248],
    ),
    # Every expert gets every token, times the router's score.
    "llama4_text": (
        HEADS
        | {"num_local_experts": 4, "intermediate_size": 40, "intermediate_size_mlp": 48, "moe_layers": [1]}
        | {"num_experts_per_tok": 2},
        [48, 200],
    ),
    # Biases, clamped gates in every other column, and weights stored transposed.
    "gpt_oss": (
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        [192, 192],
    ),
    # What the shared expert writes is weighed.
    "qwen2_moe": (HEADS | ROUTED | OWN | {"shared_expert_intermediate_size": 20}, [180, 180]),
    "qwen3_5_moe_text": (HEADS | ROUTED | OWN | LINEAR_ATTENTION, [216, 216]),
}
"""Settings of decoders with experts, and the neurons of their two layers: 4 · each, and of the shared expert."""


@pytest.fixture
def mixture(loaded):
    """The network of experts, put back to the implementation it came with."""
    model = loaded("qwen3_vl_moe")
    implementation = model.network.config.get_text_config()._experts_implementation
    yield model
    model.network.set_experts_implementation(implementation)


@pytest.fixture
def decoder(loaded):
    """A network with a decoder of another kind in place of LLaVA's, whose weights are larger than untrained ones."""

    def build(name, dtype=torch.float32):
        torch.manual_seed(0)
        network = loaded("llava").variation(dtype, model_type=name, **DECODERS[name][0]).eval()
        for name, weight in network.named_parameters():
            if weight.dim() > 1 or name.endswith("bias"):
                nn.init.normal_(weight, std=0.2)
        return network

    return build


def contributions(network, inputs):
    """What each layer's neurons add up to, what its MLP writes, and the logits."""
    parts = locate(network)
    activations, outputs, biases = {}, {}, {}

    def keep(layer, _, __, output):
        outputs[layer] = block_output(output).flatten(0, -2)

    with ExitStack() as hooks:
        hooks.enter_context(
            capture_activations(
                network, parts.of("language"), lambda layer, found, _: activations.setdefault(layer, found)
            )
        )
        for layer, projection in enumerate(parts.of("language")):
            module = network.get_submodule(projection.path)
            hooks.enter_context(module.register_forward_hook(partial(keep, layer)))
            biases[layer] = 0
            if projection.experts:
                receive = partial(biases.__setitem__, layer)
                hooks.enter_context(Experts.of(network, projection).captured_biases(receive))
        with torch.no_grad():
            logits = network(**inputs, use_cache=False).logits
    sums = {layer: found @ output_rows(network, parts.of("language")[layer]) for layer, found in activations.items()}
    return {layer: (found + biases[layer]).detach() for layer, found in sums.items()}, outputs, logits


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_activation_times_rows_is_the_experts_output(mixture, implementation):
    network = mixture.network
    network.set_experts_implementation(implementation)
    plain = network(**mixture.inputs).logits
    sums, outputs, logits = contributions(network, mixture.inputs)
    assert torch.equal(logits, plain)
    for layer, written in outputs.items():
        torch.testing.assert_close(sums[layer], written, rtol=1e-5, atol=1e-5)


def test_a_token_has_activations_at_its_own_experts_alone(mixture):
    network, found = mixture.network, []
    projection = locate(network).of("language")[0]
    with Experts.of(network, projection).captured(lambda activation, _: found.append(activation)):
        network(**mixture.inputs)
    # Two of four experts see a token; the other two's units are exactly zero.
    assert found[0].unflatten(1, (projection.experts, -1)).any(-1).sum(-1).eq(2).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_contributions_of_routed_and_shared_experts_add_up(loaded, decoder, name, dtype):
    network = decoder(name, dtype)
    parts = locate(network)
    assert [projection.width for projection in parts.of("language")] == DECODERS[name][1]
    with torch.no_grad():
        plain = network(**loaded("llava").inputs, use_cache=False).logits
    sums, outputs, logits = contributions(network, loaded("llava").inputs)
    assert torch.equal(logits, plain)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for layer, written in outputs.items():
        assert float((sums[layer] - written).norm()) <= tolerance * float(written.norm())


@pytest.mark.parametrize("name", ["glm4_moe", "aria_text", "qwen2_moe", "llama4_text"])
def test_changed_activations_of_experts_are_as_if_the_rows_were_changed(loaded, decoder, name):
    network, inputs = decoder(name), loaded("llava").inputs
    projection = locate(network).of("language")[1]
    # Of routed experts, and the last one of the shared expert.
    units = torch.tensor([0, 50, projection.width - 1])
    before, plain = {key: value.clone() for key, value in network.state_dict().items()}, network(**inputs).logits
    with Experts.of(network, projection).changed(units, torch.zeros_like):
        ablated = network(**inputs).logits
        with Experts.of(network, projection).changed(units[:1], torch.ones_like):
            assert not torch.allclose(network(**inputs).logits, ablated)
    assert not torch.allclose(ablated, plain)
    rows = output_rows(network, projection)[units]
    set_output_rows(network, projection, units, torch.zeros_like(rows))
    assert not output_rows(network, projection)[units].any()
    torch.testing.assert_close(network(**inputs).logits, ablated)
    assert torch.equal(Experts.of(network, projection).rows(units), torch.zeros_like(rows))
    set_output_rows(network, projection, units, rows)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(network(**inputs).logits, plain)


def test_changed_experts_of_a_table_are_as_if_the_rows_were_changed(mixture):
    network, units = mixture.network, torch.tensor([0, 30, 95])
    projection = locate(network).of("language")[0]
    plain = network(**mixture.inputs).logits
    with Experts.of(network, projection).changed(units, torch.zeros_like):
        ablated = network(**mixture.inputs).logits
    assert not torch.allclose(ablated, plain)
    rows = output_rows(network, projection)[units]
    set_output_rows(network, projection, units, torch.zeros_like(rows))
    torch.testing.assert_close(network(**mixture.inputs).logits, ablated)
    set_output_rows(network, projection, units, rows)
    assert torch.equal(network(**mixture.inputs).logits, plain)


@pytest.mark.parametrize("name", ["glm4_moe", "aria_text", "qwen2_moe", "llama4_text"])
def test_a_model_with_a_shared_expert_passes_every_check(tiny, decoder, name, tmp_path):
    folder = shutil.copytree(tiny("llava"), tmp_path / name)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    decoder(name).save_pretrained(folder)
    model = load_model(str(folder))
    assert model.parts.family == "probed"
    assert [check.name for check in check_model(model) if not check.passed] == []
    # An edit that is learned, as hooks, and the same edit in the weights.
    last = model.parts.of("language")[-1]
    deltas = Deltas(model, [(last.layer, unit) for unit in (3, last.width - 1)])
    (parameters,) = deltas.parameters[last.layer]
    parameters.data = torch.randn(parameters.shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.tensor([[9, 10, 11, 12]])}
    with torch.no_grad(), deltas.added():
        hooked = model.network(**inputs).logits
    units = deltas.units[last.layer]
    set_output_rows(model.network, last, units, output_rows(model.network, last)[units] + deltas.rows(last.layer))
    with torch.no_grad():
        torch.testing.assert_close(model.network(**inputs).logits, hooked, rtol=1e-4, atol=1e-4)
        with ablate(model, [f"L{last.layer}.u{last.width - 1}"]):
            ablated = model.network(**inputs).logits
            assert not torch.allclose(ablated, hooked)
        # By its name within the shared expert, which comes after the routed ones.
        name = model.names.name(last.layer, last.width - 1)
        assert name.startswith(f"L{last.layer}.e{last.experts}.u")
        with ablate(model, name):
            assert torch.equal(model.network(**inputs).logits, ablated)


@pytest.mark.parametrize("name", DECODERS)
def test_every_neuron_has_a_name_of_its_own(decoder, name):
    network = decoder(name)
    projections = locate(network).of("language")
    names = NeuronNames(tuple(routed_experts(network, one) for one in projections))
    every = [(layer, unit) for layer, one in enumerate(projections) for unit in range(one.width)]
    written = [names.name(*one) for one in every]
    assert len(set(written)) == len(every)
    assert [names.parse(one) for one in written] == every
    assert {"e" in one for one, (layer, _) in zip(written, every, strict=True) if not projections[layer].experts} <= {
        False
    }


def test_experts_of_text_write_nothing_at_an_image_that_has_experts_of_its_own(open_type):
    model = open_type("ernie4_5_vl_moe")
    projection = model.projections[1]
    batch, found, written = example(model), [], []
    module = model.network.get_submodule(projection.path)
    with (
        Experts.of(model.network, projection).captured(lambda activation, _: found.append(activation)),
        torch.no_grad(),
    ):
        handle = module.register_forward_hook(lambda *call: written.append(block_output(call[2]).flatten(0, -2)))
        model.network(**batch.inputs)
        handle.remove()
    image = torch.zeros(batch.positions, dtype=torch.bool)
    image[batch.image_positions(0)] = True
    routed = 4 * 40
    assert image.any()
    assert found[0].shape == (len(image), projection.width)
    assert not found[0][image, :routed].any()
    assert found[0][image, routed:].any(1).all()
    assert found[0][~image, :routed].any(1).all()
    # At a text's tokens the neurons write all that the module writes.
    sums = found[0] @ output_rows(model.network, projection)
    torch.testing.assert_close(sums[~image], written[0][~image], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sums[image], written[0][image], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in DECODERS if DECODERS[name][1][1] > 48])
def test_a_neuron_planted_in_a_routed_expert_is_found_first(open_model, decoder, name):
    network = decoder(name)
    model = replace(open_model("llava"), network=network, parts=locate(network))
    asked = partial(model.contributions, picture(30), CAPTIONS[0], concept="dog")
    projection = model.projections[1]
    count, units = routed_experts(network, projection)
    # It is active at the noun, so its expert is one of the token's own.
    activation = asked(score="activation")[1, : count * units]
    planted = int(activation.abs().argmax())
    (position,) = positions_of(example(model), [("", NOUNS.find(CAPTIONS[0], "en", None)[:1])])
    word = unembedding_rows(network, model.parts)[position.token].detach()
    row = 30 * activation[planted].sign() * word / word.norm()
    set_output_rows(network, projection, torch.tensor([planted]), row[None])
    found = asked()
    layer, unit = divmod(int(found.argmax()), found.shape[1])
    assert model.names.name(layer, unit) == f"L1.e{planted // units}.u{planted % units}"
    assert float(found[1, planted]) == pytest.approx(30 * float(activation[planted].abs() * word.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "llama4"])
def test_effects_of_experts_are_the_slopes_of_log_odds(open_type, name):
    """Their modules return more than what they write."""
    model = open_type(name)
    batch = example(model)
    positions = positions_of(batch, [("", NOUNS.find(CAPTIONS[0], "en", None)[:1])])
    products, _ = gradient_pass(model, batch, positions, "effect")

    def log_odds():
        with cache_activations(model, batch, positions) as found, torch.no_grad():
            forward(model, batch)
        return token_log_odds(model, found.hidden, found.tokens).item()

    last = model.projections[1]
    # The strongest neuron of a routed expert, and that of the shared one.
    shared = routed_experts(model.network, last)
    parts = products[1][0].split([shared[0] * shared[1], last.width - shared[0] * shared[1]])
    for part, first in zip(parts, (0, len(parts[0])), strict=True):
        unit = first + int(part.abs().argmax())
        high, low = [], []
        for found, factor in ((high, 1.02), (low, 0.98)):
            with scale(model, [(1, unit)], factor):
                found.append(log_odds())
        assert (high[0] - low[0]) / 0.04 == pytest.approx(float(products[1][0, unit]), rel=2e-2)


@pytest.mark.parametrize("settings", [{"moe_num_shared_experts": 0}, {"use_bias": True}], ids=["alone", "biased"])
def test_experts_of_text_are_found_among_others_without_a_shared_one_too(open_type, settings):
    model = open_type("ernie4_5_vl_moe")
    config = type(model.network.config).from_dict(model.network.config.to_dict())
    for name, value in settings.items():
        setattr(config.text_config, name, value)
    network = type(model.network)(config).eval().requires_grad_(False)
    randomise(network, "ernie")
    found = replace(model, network=network, parts=locate(network, model.processor))
    assert found.projections[1].path.endswith("layers.1.mlp")
    held, detail = identity(found)
    assert held, detail


def test_the_gates_of_a_shared_expert_are_those_of_all(loaded, decoder):
    network = decoder("glm4_moe")
    projection = locate(network).of("language")[1]
    function = gate_function(network, projection)
    gates, activations = [], []

    def receive(activation, gate):
        activations.append(activation)
        gates.append(gate)

    with Experts.of(network, projection).captured(receive), torch.no_grad():
        network(**loaded("llava").inputs)
    # Where a gate is closed, so is the neuron.
    assert activations[0].shape == gates[0].shape == (activations[0].shape[0], projection.width)
    closed = function(gates[0]).abs() < 1e-6
    assert closed.any()
    assert activations[0][closed].abs().max() < 1e-3


def test_blocks_without_experts_among_blocks_with(loaded):
    first, second = locate(loaded("qwen3_vl_moe").variation(mlp_only_layers=[1])).of("language")
    assert (first.experts, first.width, first.gate) == (4, 96, None)
    assert (second.experts, second.width) == (0, 48)
    assert second.gate.endswith("layers.1.mlp.gate_proj")
