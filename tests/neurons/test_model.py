"""The model as users hold it: any kind of picture, any noun of the caption, refusals that name what is wrong."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmray.errors import InputError
from mmray.features.census.model_check import check_model
from mmray.models.families import HABITS
from mmray.models.generation import caption_of, generate
from mmray.models.interventions import ablate, by_layer
from mmray.models.loading import DTYPES, load
from mmray.models.parts import output_rows
from mmray.models.prompting import prompt_text
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons import validation_cache
from mmray.neurons.model import NeuronModel, load_model
from mmray.neurons.validation import CHECKS, assert_sound
from mmray.neurons.validation_cache import is_validated
from tests.support.samples import CAPTIONS, picture, png


def test_pictures_come_as_files_paths_or_objects(open_model, tmp_path):
    model = open_model("llava")
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture(1)))
    grey = picture(1).convert("L")
    expected = model.contributions(picture(1), "a dog", "dog")
    for image in (path, str(path), path.read_bytes(), np.asarray(picture(1))):
        assert torch.equal(model.contributions(image, "a dog", "dog"), expected)
    assert not torch.equal(model.contributions(grey, "a dog", "dog"), expected)
    assert not torch.equal(model.contributions(None, "a dog", "dog"), expected)


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((4, 4, 5), np.uint8)])
def test_arrays_that_are_no_pictures_are_refused(open_model, array):
    with pytest.raises(InputError, match="image: not an image that can be read"):
        open_model("llava").caption(array)


def test_a_caption_is_what_the_model_generates_and_holds_ablations(open_model):
    model = open_model("llava")
    (tokens,) = generate(model, [prompt_text(model, None, None)], [picture(1)], 8)
    assert model.caption(picture(1), longest=8) == caption_of(model, tokens)[0]
    assert model.caption(picture(1), longest=3) == caption_of(model, tokens[:3])[0]
    assert model.generate([picture(1), picture(2)], longest=8) == [model.caption(picture(n), longest=8) for n in (1, 2)]
    every = [(layer, unit) for layer, width in enumerate(model.widths) for unit in range(width)]
    with ablate(model, every):
        assert model.caption(picture(1), longest=8) != caption_of(model, tokens)[0]


def test_a_plotted_heat_map_is_the_map_over_its_image(open_model):
    model = open_model("llava")
    figure = model.plot_heat_map(picture(1), "L0.u1")
    (image,) = figure.layout.images
    assert (image.sizex, image.sizey) == picture(1).size
    assert np.allclose(figure.data[0].z, model.heat_map(picture(1), ["L0.u1"]).numpy())
    # Both from the top.
    assert figure.layout.yaxis.range == (picture(1).height, 0)


def test_a_printed_model_says_its_family_and_size(open_model):
    assert "(llava, 2 layers, 96 neurons, torch.float32, cpu)" in repr(open_model("llava"))


def test_one_name_stands_for_one_neuron(open_model):
    model = open_model("llava")
    assert torch.equal(model.heat_map(picture(1), "L1.u7"), model.heat_map(picture(1), ["L1.u7"]))
    assert by_layer(model, "L1.u7") == {1: [7]}


def test_what_is_asked_changes_what_is_given(open_model):
    model = open_model("llava")
    plain = model.contributions(picture(1), "a dog and a cat", "dog")
    assert plain.shape == (2, 48)
    assert plain.dtype == torch.float32
    for options in (
        {"score": "gate"},
        {"score": "activation"},
        {"score": "gradient"},
        {"fold_norm": True},
        {"prompt": "What?"},
        {"language": "fr"},
    ):
        assert not torch.equal(model.contributions(picture(1), "a dog and a cat", "dog", **options), plain)
    assert not torch.equal(model.contributions(picture(1), "a dog and a cat", "cat"), plain)
    assert torch.equal(model.contributions(picture(1), "a dog and a cat", "DOG"), plain)


@pytest.mark.parametrize(("caption", "concept"), [("a hotdog", "dog"), ("", "dog"), ("a dog", ""), ("a dog", "cat")])
def test_a_noun_that_is_not_there_is_named(open_model, caption, concept):
    with pytest.raises(InputError, match="does not name") as refusal:
        open_model("llava").contributions(picture(1), caption, concept)
    assert repr(concept) in str(refusal.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_passes_the_checks_that_users_can_run(open_model, variant):
    checks = check_model(open_model(variant))
    assert [check.name for check in checks] == [*CHECKS, "a census of two samples"]
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def failing(model):
    return {check.name for check in check_model(model) if not check.passed}


def test_an_image_that_is_not_looked_at_fails_the_check(open_model, monkeypatch):
    model = open_model("llava")
    forward = type(model.network).forward

    def blind(network, pixel_values=None, **inputs):
        seen = None if pixel_values is None else torch.ones_like(pixel_values)
        return forward(network, pixel_values=seen, **inputs)

    monkeypatch.setattr(type(model.network), "forward", blind)
    assert failing(model) == {"the image is seen"}


@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "gemma3", "idefics3", "blip2_opt"])
def test_another_token_taken_for_the_image_s_fails_the_check(open_model, variant):
    model = open_model(variant)
    # One that stands in every prompt.
    other = model.tokenizer(" image", add_special_tokens=False).input_ids[0]
    found = failing(replace(model, parts=replace(model.parts, image_token_id=other)))
    # The captions of the small census have that token too, and are refused for it.
    assert {"the image is seen"} <= found <= {"the image is seen", "a census of two samples"}


def test_captions_that_see_their_own_end_fail_the_check(open_model, monkeypatch):
    model = open_model("paligemma")
    # PaliGemma's prompt is seen in both directions: a caption marked as prompt sees its later words.
    monkeypatch.setitem(HABITS, "paligemma", replace(HABITS["paligemma"], caption_type=0))
    assert failing(model) == {"later words are hidden"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_that_is_not_of_these_neurons_is_refused_when_the_model_loads(tiny, monkeypatch, tmp_path, dtype):
    model = load(str(tiny("llava")), dtype, "cpu", wrap=NeuronModel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = model.network.get_submodule(model.projections[0].path)
    handle = module.register_forward_hook(lambda *call: call[2] * 1.01)
    try:
        with pytest.raises(InputError, match="sum of contributions") as refusal:
            assert_sound(model)
        assert "check-model" in str(refusal.value)
        assert failing(model) == {next(iter(CHECKS))}
        assert not is_validated(model)
    finally:
        handle.remove()
    assert_sound(model)
    assert is_validated(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_mixed_up_among_many_neurons_fail_the_check(loaded_with, monkeypatch, dtype):
    # A token's contributions cancel: of the sum of their sizes, what is wrong with them all is four per cent.
    model = loaded_with("llava", intermediate_size=11_008)
    model.network.to(DTYPES[dtype])
    assert not failing(model)
    order = torch.randperm(model.widths[0], generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("mmray.neurons.validation.output_rows", lambda *of: output_rows(*of)[order])
    assert failing(model) == {next(iter(CHECKS))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [{"final_norm": "model.language_model.layers.0.input_layernorm"}, {"logit_scale": 2}])
def test_another_norm_or_scale_than_the_last_fails_the_check(tiny, dtype, wrong):
    model = load(str(tiny("llava")), dtype, "cpu", wrap=NeuronModel)
    assert failing(replace(model, parts=replace(model.parts, **wrong))) == {"logits = unembedding · final norm"}


def test_a_proven_checkpoint_is_proven_again_only_when_it_has_changed(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny("llava"), tmp_path / "model")
    asked = []
    for name, test in list(CHECKS.items()):
        monkeypatch.setitem(CHECKS, name, lambda model, name=name, test=test: asked.append(name) or test(model))
    for _ in range(2):
        load_model(str(folder))
        assert asked == list(CHECKS)
    load_model(str(folder), dtype="bf16")
    assert asked == [*CHECKS, *CHECKS]
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    load_model(str(folder))
    assert asked == [*CHECKS, *CHECKS, *CHECKS]
    (folder / "modeling.py").write_text("code = 1")
    load_model(str(folder))
    assert len(asked) == 4 * len(CHECKS)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    load_model(str(folder))
    assert len(asked) == 5 * len(CHECKS)


def test_a_check_that_can_t_be_tried_has_failed(open_model, monkeypatch):
    model = open_model("blip2_opt")
    monkeypatch.setattr("mmray.neurons.validation.encode", lambda *_: (_ for _ in ()).throw(ValueError("no\nway")))
    checks = check_model(model)
    details = {check.name: check.detail for check in checks if not check.passed}
    assert set(details) == set(CHECKS)
    assert set(details.values()) == {"ValueError: no way"}


def test_a_part_in_another_number_format_is_proven_again(tiny):
    """BLIP's queries stay in fp32, and are its first weights."""
    names = {
        validation_cache.fingerprint(load(str(tiny("blip2_opt")), dtype, "cpu", wrap=NeuronModel))
        for dtype in ("fp32", "fp16")
    }
    assert len(names) == 2
    model = load(str(tiny("llava")), "fp32", "cpu", wrap=NeuronModel)
    assert validation_cache.fingerprint(model) != validation_cache.fingerprint(
        replace(model, parts=replace(model.parts, logit_scale=2))
    )


def test_what_there_is_not_is_said_in_a_line(tiny, open_model):
    with pytest.raises(InputError, match="unknown score 'foo'; choose from contribution"):
        open_model("llava").contributions(picture(0), CAPTIONS[0], "dog", score="foo")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="does not go on cuda"):
            load_model(str(tiny("llava")), device="cuda")


@pytest.mark.parametrize("score", ["effect", "gradient-last"])
def test_of_a_text_mllama_s_other_blocks_have_no_gradient(open_model, score):
    model = open_model("mllama")
    found = model.contributions(None, CAPTIONS[0], "dog", score=score)
    left_out = model.network.config.text_config.cross_attention_layers
    assert [layer for layer, row in enumerate(found) if not row.abs().sum()] == left_out != []
