"""What is handed over is what the projections get, rows in order, and nothing stays behind."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from mmray.errors import InputError
from mmray.models.capture import capture_activations, capture_input, gate_function
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.scoring import score_batch
from tests.support.samples import CAPTIONS, batch_of, hooks

GATES = {
    "llava": functional.silu,
    "gemma3": lambda opened: functional.gelu(opened, approximate="tanh"),
    "mllama": functional.silu,
    "instructblip_t5": lambda opened: functional.gelu(opened, approximate="tanh"),
}
LINEAR = [variant for variant in VARIANTS if variant != "qwen3_vl_moe"]


def captured(model, batch):
    seen = []
    with torch.inference_mode(), capture_activations(model.network, model.projections, lambda *call: seen.append(call)):
        model.network(**batch.to(model.device, model.network.dtype))
    return seen


@pytest.mark.parametrize("variant", LINEAR)
def test_hands_over_each_projection_s_input(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:2])
    expected, handles = [], []
    for projection in model.projections:
        module = model.network.get_submodule(projection.path)
        handles.append(module.register_forward_pre_hook(lambda _, arguments: expected.append(arguments[0].clone())))
    try:
        seen = captured(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    assert [layer for layer, _, _ in seen] == list(range(len(model.projections)))
    for (layer, activation, opened), given in zip(seen, expected, strict=True):
        assert activation.shape == opened.shape == (2 * batch.positions, model.widths[layer])
        assert torch.equal(activation, given.reshape(activation.shape))


@pytest.mark.parametrize("variant", GATES)
def test_what_opens_a_neuron_is_the_gate_before_its_function(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:2])
    gates, handles = [], []
    for projection in model.projections:
        module = model.network.get_submodule(projection.gate)
        handles.append(module.register_forward_hook(lambda *call: gates.append((call[1][0].clone(), call[2].clone()))))
    try:
        seen = captured(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for (layer, activation, opened), (state, gate) in zip(seen, gates, strict=True):
        projection = model.projections[layer]
        assert torch.equal(opened, gate.reshape(opened.shape))
        function = gate_function(model.network, projection)
        torch.testing.assert_close(function(opened), GATES[variant](opened))
        parent, _, name = projection.gate.rpartition(".")
        other = model.network.get_submodule(f"{parent}.{name.replace('gate', 'up').replace('wi_0', 'wi_1')}")
        product = function(opened) * other(state).reshape(opened.shape)
        torch.testing.assert_close(product, activation)


def test_one_linear_with_gate_and_factor_gives_the_gate(loaded_with):
    model = loaded_with("llava", model_type="phi3", num_key_value_heads=2)
    assert all(projection.gate_fused for projection in model.projections)
    batch, _ = batch_of(model, CAPTIONS[:2])
    outputs = []
    module = model.network.get_submodule(model.projections[0].gate)
    handle = module.register_forward_hook(lambda *call: outputs.append(call[2].clone()))
    seen = captured(model, batch)
    handle.remove()
    _, activation, opened = seen[0]
    gate, factor = outputs[0].flatten(0, 1).chunk(2, dim=1)
    assert torch.equal(opened, gate)
    torch.testing.assert_close(gate_function(model.network, model.projections[0])(opened) * factor, activation)


def test_of_routed_experts_the_gate_s_half_opens_the_neuron(open_model):
    model = open_model("qwen3_vl_moe")
    batch, _ = batch_of(model, CAPTIONS[:2])
    given, handles = [], []
    for projection in model.projections:
        module = model.network.get_submodule(projection.path)
        see = lambda _, arguments, named: given.append([*arguments, *named.values()])  # noqa: E731
        handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
    seen = captured(model, batch)
    for handle in handles:
        handle.remove()
    for (layer, activation, opened), (states, chosen, weights) in zip(seen, given, strict=True):
        projection = model.projections[layer]
        module = model.network.get_submodule(projection.path)
        gate, factor = torch.einsum("th,enh->ten", states, module.gate_up_proj).chunk(2, dim=2)
        routed = torch.zeros(gate.shape[:2]).scatter(1, chosen, weights)[:, :, None]
        expected = (gate * (routed > 0)).flatten(1)
        torch.testing.assert_close(opened, expected)
        product = gate_function(model.network, projection)(expected) * (factor * routed).flatten(1)
        torch.testing.assert_close(product, activation)


def test_experts_whose_gate_is_mixed_in_their_own_way_have_none_to_score(open_model, monkeypatch):
    model = open_model("qwen3_vl_moe")
    module = model.network.get_submodule(model.projections[0].path)
    own = lambda _, entered: entered[..., ::2].sigmoid() * entered[..., 1::2]  # noqa: E731
    monkeypatch.setattr(type(module), "_apply_gate", own)
    batch, places = batch_of(model, CAPTIONS[:1])
    for _, activation, opened in captured(model, batch):
        assert opened is activation
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: no activation function"):
        score_batch(model, batch, places, "gate")


def test_without_a_gate_the_activation_opens_the_neuron(open_model):
    model = open_model("blip2_opt")
    batch, _ = batch_of(model, CAPTIONS[:2])
    for layer, activation, opened in captured(model, batch):
        assert opened is activation
        assert gate_function(model.network, model.projections[layer])(opened) is opened


def test_a_gate_without_a_function_next_to_it_is_named(open_model):
    mlp = SimpleNamespace(act_fn=None)
    network = SimpleNamespace(get_submodule=lambda _: mlp)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj: no activation function"):
        gate_function(network, open_model("llava").projections[0])


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe", "blip2_opt"])
def test_hooks_go_whatever_happens(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:1])
    before = hooks(model.network)

    def refuse(*_):
        raise RuntimeError("no more memory")

    for context in (capture_activations(model.network, model.projections, refuse), capture_input(model.norm, refuse)):
        with pytest.raises(RuntimeError, match="no more memory"), context:
            assert hooks(model.network) > before
            model.network(**batch.to(model.device, model.network.dtype))
        assert hooks(model.network) == before
    # The next forward is seen whole.
    assert len(captured(model, batch)) == len(model.projections)
