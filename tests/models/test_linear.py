"""Quantised layers have the rows, scores and edits that dense layers with the dequantised weights have."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmray.errors import InputError
from mmray.features.census.model_check import check_model
from mmray.features.editing.checkpoint import write_checkpoint
from mmray.features.editing.edit import Purpose, WeightEdit
from mmray.models import linear
from mmray.models.capture import capture_activations
from mmray.models.interventions import ablate, add_noise, changed_rows
from mmray.models.linear import dequantise, has_quantised, rows_of
from mmray.models.parts import locate, output_rows, set_output_rows
from mmray.neurons.model import load_model
from tests.support.samples import picture

CAPTION = "An image of a dog."


class Packed(nn.Module):
    """As GPTQ and AWQ have it: four-bit integers, a scale and a zero per group of inputs, and no `weight`."""

    def __init__(self, dense, group=8):
        super().__init__()
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, dense.bias
        groups = dense.weight.detach().reshape(self.out_features, -1, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp_min(1e-6) / 15
        self.register_buffer("qweight", ((groups - low) / scale).round().to(torch.int32))
        self.register_buffer("scales", scale)
        self.register_buffer("zeros", low)

    def matrix(self):
        return (self.qweight * self.scales + self.zeros).flatten(1)

    def forward(self, states):
        return nn.functional.linear(states, self.matrix(), self.bias)


class Rounding(nn.Linear):
    """As LLM.int8() has it: a `weight` of integers, a scale per output, and activations rounded to eight bits."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        self.scales = dense.weight.detach().abs().amax(1) / 127
        self.weight = nn.Parameter((dense.weight / self.scales[:, None]).round().to(torch.int8), requires_grad=False)
        self.bias = dense.bias

    def matrix(self):
        return self.weight * self.scales[:, None]

    def forward(self, states):
        step = states.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
        return nn.functional.linear((states / step).round() * step, self.matrix(), self.bias)


def quantised(network, kind=Packed, below="layers"):
    """Replace the decoder's Linears by quantised ones."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and f"language_model.{below}." in f"{path}.":
            network.set_submodule(path, kind(module))
    return network


@pytest.fixture
def pair(loaded_with):
    """Return a model of a decoder with quantised layers, and one with the same weights in dense layers."""

    def make(kind=Packed, **settings):
        model = loaded_with("llava", **settings)
        models = [replace(model, network=quantised(copy.deepcopy(model.network), kind)) for _ in range(2)]
        dequantise(models[1].network, torch.float32)
        return models

    return make


def scores(model):
    return model.contributions(picture(20), CAPTION, concept="dog")


@pytest.mark.parametrize("kind", [Packed, Rounding])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_the_dequantised_weights(kind, bias, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 7)
    module = kind(nn.Linear(48, 32, bias=bias))
    torch.testing.assert_close(rows_of(module, torch.float32), module.matrix().T)


# Found by the table, and by the probe: with gate and factor in one, with a norm after the MLP, and without gates.
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model_type": "phi3", "num_key_value_heads": 2},
        {"model_type": "olmo2"},
        {"model_type": "starcoder2"},
    ],
    ids=lambda settings: settings.get("model_type", "llama"),
)
def test_scores_are_those_of_the_dequantised_weights(pair, settings):
    packed, dense = pair(**settings)
    assert has_quantised(packed.network)
    assert not has_quantised(dense.network)
    assert locate(packed.network).of("language") == locate(dense.network).of("language")
    torch.testing.assert_close(scores(packed), scores(dense), rtol=1e-5, atol=1e-5)
    assert [check.name for check in check_model(packed) if not check.passed] == []


def test_scores_of_kernels_that_round_activations_differ_by_the_rounding(pair):
    rounding, dense = pair(Rounding)
    first, second = scores(rounding), scores(dense)
    assert 1e-5 < float((first - second).norm() / second.norm()) < 5e-2
    assert [check.name for check in check_model(rounding) if not check.passed] == []


def test_scores_with_a_backward_pass_need_one_of_the_kernel(pair, monkeypatch):
    packed, dense = pair()
    first, second = (
        model.contributions(picture(20), CAPTION, concept="dog", score="effect") for model in (packed, dense)
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(Packed, "forward", torch.no_grad()(Packed.forward))
    with pytest.raises(InputError, match="its quantised layers have no backward pass; take a score without one"):
        packed.contributions(picture(20), CAPTION, concept="dog", score="effect")


def test_reading_rows_is_no_forward(pair):
    packed, _ = pair()
    seen = []
    with capture_activations(packed.network, packed.projections, lambda *found: seen.append(found)):
        output_rows(packed.network, packed.projections[0])
    assert not seen


def test_changed_rows_and_activations_are_as_in_dense_layers(pair):
    packed, dense = pair()
    kept = {name: value.clone() for name, value in packed.network.state_dict().items()}
    plain, found = scores(packed), []
    for model in (packed, dense):
        rows = output_rows(model.network, model.projections[1]).clone()
        with changed_rows(model, 1, [3, 9], torch.ones(2, 32)), changed_rows(model, 1, [9], torch.zeros(1, 32)):
            expected = rows.clone()
            expected[3], expected[9] = 1, 0
            torch.testing.assert_close(output_rows(model.network, model.projections[1]), expected)
            found.append(scores(model))
        with add_noise(model, ["L0.u7"], 0.5):
            found.append(scores(model))
        with ablate(model, ["L0.u7"]):
            found.append(scores(model))
        torch.testing.assert_close(output_rows(model.network, model.projections[1]), rows)
    for first, second in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(first, plain)
    assert torch.equal(scores(packed), plain)
    assert all(torch.equal(value, kept[name]) for name, value in packed.network.state_dict().items())


def test_quantised_weights_are_not_written(pair, tmp_path):
    packed, _ = pair()
    with pytest.raises(InputError, match=r"down_proj: quantised weights can't be written; --dtype bf16"):
        set_output_rows(packed.network, packed.projections[0], torch.tensor([0]), torch.zeros(1, 32))
    edit = WeightEdit(
        torch.tensor([0]), torch.tensor([3]), torch.ones(1, 32), (Purpose("noise"),), packed.digest, {}, {}
    )
    with pytest.raises(InputError, match="quantised weights can't be written"):
        write_checkpoint(packed, edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = scores(packed)
    with edit.applied(packed):
        assert not torch.allclose(scores(packed), before)


def test_quantised_experts_are_refused(loaded):
    network = loaded("qwen3_vl_moe").variation()
    experts = network.model.language_model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts: experts with quantised weights"):
        locate(network)


def test_an_fp8_checkpoint_loads_on_a_cpu(tiny, tmp_path):
    folder = shutil.copytree(tiny("llava"), tmp_path / "fp8")
    (file,) = folder.glob("*.safetensors")
    weights, expected = load_file(file), {}
    for name in [name for name in weights if "language_model" in name and name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        expected[name] = weights[name].float() * scale
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    others = ["vision_tower", "multi_modal_projector", "lm_head"]
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"]["modules_to_not_convert"] = others
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder))
    assert model.network.dtype == torch.float32
    assert [check.name for check in check_model(model) if not check.passed] == []
    rows = output_rows(model.network, model.projections[1])
    # transformers dequantises to bf16.
    wanted = expected["language_model.model.layers.1.mlp.down_proj.weight"].T
    torch.testing.assert_close(rows, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_a_checkpoint_of_a_library_stays_quantised_unless_a_dtype_is_asked_for(tiny, tmp_path, library):
    pytest.importorskip(
        library, reason=f"an optional library, large and not one of the tests' own: pip install {library}"
    )
    import transformers

    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings, tolerance = transformers.TorchAoConfig(Int8WeightOnlyConfig()), 1e-5
    else:
        settings, tolerance = transformers.BitsAndBytesConfig(load_in_8bit=True), 5e-2
    network = transformers.AutoModelForImageTextToText.from_pretrained(tiny("llava"), quantization_config=settings)
    folder = shutil.copytree(tiny("llava"), tmp_path / library)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    network.save_pretrained(folder)
    model, dense = load_model(str(folder)), load_model(str(folder), "fp32")
    assert has_quantised(model.network)
    assert not has_quantised(dense.network)
    assert [check.name for check in check_model(model) if not check.passed] == []
    first, second = scores(model), scores(dense)
    assert float((first - second).norm() / second.norm()) < tolerance
    dense.network.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
