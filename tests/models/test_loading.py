"""What is no model is refused in one line that names it; what is one is known by its content."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers

import mmray
import mmray.demo
from mmray.errors import InputError
from mmray.models.loading import describe_model, digest, load, resolve
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.model import NeuronModel


def refusal(name, call=load):
    with pytest.raises(InputError) as caught:
        call(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(name))
    return message


@pytest.fixture
def copy(tiny, tmp_path):
    """A llava folder to damage."""
    return shutil.copytree(tiny("llava"), tmp_path / "copy")


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere", "a/b/c"):
        assert "no such model folder" in refusal(name)
        assert "no such model folder" in refusal(name, describe_model)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "no such model folder" in refusal(file)
    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise OSError("offline\nand more\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert "neither a folder nor a model that the hub or its cache has (offline)" in refusal("nobody/nothing")
    assert asked == ["nobody/nothing"]


def test_a_hub_id_is_fetched_without_what_is_not_needed(tiny, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tiny("llava"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("somebody/llava") == tiny("llava")
    assert asked[0][0] == "somebody/llava"
    assert {"*.safetensors", "*.json", "*.jinja", "*.py"} <= set(asked[0][1])
    assert not any("*.bin" in patterns for _, patterns in asked)
    assert resolve("demo") == mmray.demo.MODEL


def test_weights_of_an_older_kind_are_fetched_where_there_are_no_others(copy, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(allow_patterns)
        return str(copy)

    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("somebody/llava") == copy
    assert asked[1:] == [["*.bin"]]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, copy):
    assert "not a model folder (no config.json)" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json can't be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "from the future"}')
    assert "not a vision-language or causal language model" in refusal(tmp_path)
    assert "not a vision-language or causal language model" in refusal(tmp_path, describe_model)


def test_damaged_or_missing_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:1000], whole[:-100], b"", b"no weights at all" * 10):
        weights.write_bytes(damaged)
        refusal(copy)
    weights.unlink()
    refusal(copy)
    assert "no weights" in refusal(copy, lambda name: digest(resolve(name)))


def test_weights_of_another_shape_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 56
    (copy / "config.json").write_text(json.dumps(config))
    assert "not a vision-language or causal language model" in refusal(copy)


def test_a_language_model_without_its_tokenizer_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "not a vision-language or causal language model" in refusal(tmp_path)


@pytest.mark.parametrize("processor", [SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False)), SimpleNamespace()])
def test_a_tokenizer_that_does_not_know_its_characters_is_refused(tiny, monkeypatch, processor):
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    assert "no fast tokenizer" in refusal(tiny("llava"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_facts_without_weights_are_those_of_the_loaded_model(open_model, variant):
    model = open_model(variant)
    facts = describe_model(model.name)
    assert facts["widths"] == list(model.widths)
    assert facts["projections"] == [projection.path for projection in model.projections]
    assert (facts["final_norm"], facts["unembedding"]) == (model.parts.final_norm, model.parts.unembedding)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.network.parameters())
    assert facts["image_tokens"] > 0
    assert json.loads(json.dumps(facts)) == facts


def test_a_family_outside_the_table_is_described_by_the_probe(loaded_with, tmp_path):
    model = loaded_with("llava", model_type="starcoder2")
    model.network.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    facts = describe_model(str(tmp_path))
    assert facts["family"] == "probed"
    assert facts["projections"] == [f"model.language_model.layers.{layer}.mlp.c_proj" for layer in (0, 1)]
    assert facts["widths"] == [48, 48]


def test_a_loaded_model_is_frozen_and_in_the_asked_format(tiny):
    for dtype, expected in {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}.items():
        model = mmray.load_model(str(tiny("llava")), dtype=dtype, device="cpu")
        assert isinstance(model, NeuronModel)
        assert {parameter.dtype for parameter in model.network.parameters()} == {expected}
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        assert not model.network.training


@pytest.mark.parametrize("dtype", ["float16", "FP16", "", None, torch.float16])
def test_an_unknown_number_format_is_refused(tiny, dtype):
    for call in (load, mmray.load_model):
        message = refusal(tiny("llava"), lambda name, call=call: call(name, dtype))
        assert message.endswith(f"unknown dtype {dtype!r}; choose from auto, fp32, bf16, fp16")


def test_the_digest_is_that_of_the_content(copy, tiny):
    first = digest(tiny("llava"))
    assert digest(copy) == first
    (copy / "README.md").write_text("a note")
    assert digest(copy) == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert digest(copy) != first
    shutil.copy(tiny("llava") / "model.safetensors", copy)
    assert digest(copy) == first
    (copy / "modeling.py").write_text("code = 1")
    code = digest(copy)
    assert code != first
    (copy / "modeling.py").write_text("code = 2")
    assert digest(copy) not in (code, first)
    (copy / "modeling.py").unlink()
    (copy / "tokenizer.json").rename(copy / "tokens.json")
    assert digest(copy) != first
