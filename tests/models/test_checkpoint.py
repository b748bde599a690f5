"""A checkpoint is what its files say: nothing is drawn at random, fetched from elsewhere, or left out of its digest."""

import json
import logging
import shutil
import sys

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from mmray.cli import app
from mmray.errors import InputError
from mmray.features.editing.checkpoint import write_checkpoint
from mmray.models.checkpoint import checkpoint_files
from mmray.models.loading import describe_model, digest, load
from mmray.models.templates import CHARACTERS, render


@pytest.fixture
def copy(tiny, tmp_path):
    """A llava folder to damage."""
    return shutil.copytree(tiny("llava"), tmp_path / "copy")


def without(folder, *names):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weight_names(folder):
    return sorted(safetensors.torch.load_file(folder / "model.safetensors"))


@pytest.mark.slow
def test_any_missing_weight_is_refused_by_name(tiny, tmp_path):
    for name in weight_names(tiny("llava")):
        folder = shutil.copytree(tiny("llava"), tmp_path / "one")
        without(folder, name)
        message = refusal(load, str(folder))
        assert "weights that the model needs are missing from the checkpoint (1: " in message
        assert name.rsplit(".", 2)[-2] in message
        shutil.rmtree(folder)


def test_a_missing_weight_is_told_once(tiny, copy):
    without(copy, next(name for name in weight_names(copy) if "lm_head" in name))
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        refusal(load, str(copy))
        load(str(tiny("llava")))
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == []


def test_a_tied_unembedding_is_not_missing(tiny):
    tied = [
        name
        for name in ("gemma3", "paligemma", "qwen2_vl", "blip2_opt")
        if "lm_head" not in str(weight_names(tiny(name)))
    ]
    assert tied
    for name in tied:
        load(str(tiny(name)))


def test_weights_that_nothing_uses_are_told(copy):
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["model.stray.weight"] = torch.zeros(2)
    safetensors.torch.save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert load(str(copy)).unused == ("model.stray.weight",)
    result = CliRunner().invoke(app, ["check-model", str(copy)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "1 weight of the checkpoint is not used: model.stray.weight" in result.output


def split(folder, second):
    """Store one weight in a further file, which an index names."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(iter(weights))
    (folder / second).parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: weights.pop(name)}, folder / second, {"format": "pt"})
    safetensors.torch.save_file(weights, folder / "first.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    places = {name: second} | dict.fromkeys(weights, "first.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_every_file_that_an_index_names_is_in_the_digest(copy):
    split(copy, "sub/second.safetensors")
    assert "sub/second.safetensors" in checkpoint_files(copy)
    load(str(copy))
    before = digest(copy)
    damaged = bytearray((copy / "sub/second.safetensors").read_bytes())
    damaged[-1] ^= 1
    (copy / "sub/second.safetensors").write_bytes(damaged)
    assert digest(copy) != before
    (copy / "sub/second.safetensors").unlink()
    assert "sub/second.safetensors, which model.safetensors.index.json names, is missing" in refusal(load, str(copy))


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_the_folder_are_not_read(copy, absolute):
    split(copy, "../outside.safetensors")
    if absolute:
        index = copy / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("../outside", f"{copy.parent}/outside"))
    for call in (load, lambda name: digest(copy)):
        assert "outside the folder" in refusal(call, str(copy))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_damaged_index_is_one_line(copy, content):
    (copy / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(load, str(copy))


def changed(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_refused(copy, key):
    changed(copy, lambda config: config["text_config"].update({key: "somebody/kernel"}))
    for call in (load, describe_model):
        assert f"asks for kernels of the hub ({key}: somebody/kernel)" in refusal(call, str(copy))


def test_known_implementations_are_not(copy):
    changed(copy, lambda config: config.update(attn_implementation="eager"))
    assert load(str(copy)).network.config._attn_implementation == "eager"


def test_a_model_without_end_is_refused_at_once(copy):
    changed(copy, lambda config: config["text_config"].update(num_hidden_layers=100_000))
    for call in (load, describe_model):
        assert "num_hidden_layers: 100000" in refusal(call, str(copy))


def test_an_adapter_is_refused(copy):
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "not a complete checkpoint" in refusal(load, str(copy))


def test_damaged_weights_are_called_so(copy):
    (copy / "model.safetensors").write_bytes(b"no weights at all" * 10)
    assert "damaged weights" in refusal(load, str(copy))


class Template:
    """Stands for a processor with this template."""

    def __init__(self, model, template):
        self.tokenizer, self.template = model.tokenizer, template

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options)


ENDLESS = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDLESS, "has not ended after 0.5 seconds"),
        (f"{{{{ 'x' * {CHARACTERS + 1} }}}}", f"writes {CHARACTERS + 1:,} characters"),
        (f"{{{{ 'x' * {sys.maxsize} }}}}", "fails"),
        ("{{ raise_exception('no images here') }}", "fails (no images here)"),
        ("{% if %}", "fails"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
        ("{{ 1 + 'a' }}", "fails"),
    ],
)
def test_a_chat_template_is_bounded(open_model, template, expected):
    message = refusal(lambda: render("m", Template(open_model("demo"), template), [{"role": "user"}], seconds=0.5))
    assert message.startswith("m: its chat template ")
    assert expected in message


def test_an_endless_template_stops_running(open_model):
    import threading
    import time

    refusal(lambda: render("m", Template(open_model("demo"), ENDLESS), [{"role": "user"}], seconds=0.2))
    until = time.monotonic() + 10
    while any(thread.name == "chat template" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_checkpoint_written_with_an_edit_keeps_the_folders_of_its_processor(open_model, tmp_path):
    from contextlib import nullcontext
    from types import SimpleNamespace

    model = open_model("instructblip_vicuna")
    write_checkpoint(model, SimpleNamespace(check=lambda _: None, applied=lambda _: nullcontext()), tmp_path / "out")
    assert set(checkpoint_files(tmp_path / "out")) == set(checkpoint_files(model.folder))
    load(str(tmp_path / "out"))
