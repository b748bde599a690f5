"""Batches are what the family's processor makes of the whole text, and padding and captions leak nowhere."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

from mmray.errors import InputError
from mmray.features.census import shard
from mmray.models.capture import capture_input
from mmray.models.prompting import PROMPTS, encode, prompt_text, run_processor, tokenize_caption
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.model import load_model
from tests.support.samples import CAPTIONS, analyse, batch_of, picture, samples

DECODERS = [variant for variant in VARIANTS if not variant.endswith("t5")]
TEXTS = (CAPTIONS[0], CAPTIONS[3], CAPTIONS[2])


def caption_states(model, batch):
    """The final norm's input at every position, rows apart."""
    states = []
    with torch.inference_mode(), capture_input(model.norm, states.append):
        model.network(**batch.to(model.device, model.network.dtype))
    return states[0]


# PaliGemma's processor ends every prompt with a line break, before the caption.
@pytest.mark.parametrize("variant", [variant for variant in DECODERS if variant != "paligemma"])
def test_a_row_is_what_the_processor_makes_of_prompt_and_caption(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, TEXTS)
    prompt = prompt_text(model, None, "en")
    blank = "" if prompt[-1].isspace() else " "
    for row, caption in enumerate(TEXTS):
        whole = run_processor(model, [f"{prompt}{blank}{caption}"], [picture(row)])
        length = whole["input_ids"].shape[1]
        assert batch.caption_start[row] + len(batch.tokens[row]) == length
        for name, value in whole.items():
            made = batch.inputs[name]
            # The Q-Former reads the prompt alone, as it does when the model writes the caption itself.
            if value.shape[:2] == whole["input_ids"].shape and not name.startswith("qformer"):
                assert torch.equal(made[row, :length], value[0]), name
                assert name in ("input_ids", "mm_token_type_ids") or not made[row, length:].any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_offsets_spell_the_caption(open_model, variant):
    model = open_model(variant)
    for caption in (*TEXTS, "Ein Hund läuft — 犬 🐕", " dog ", "a\tdog\n"):
        tokens, offsets = tokenize_caption(model, prompt_text(model, None, "en"), caption)
        assert model.tokenizer.decode(tokens).strip() == caption.strip()
        assert offsets[0][0] == 0
        assert offsets[-1][1] == len(caption)
        # A blank between prompt and caption may be a token of its own.
        assert all(0 <= start < stop for start, stop in offsets if (start, stop) != (0, 0))
        assert all(first[1] >= second[0] and first[1] <= second[1] for first, second in pairwise(offsets))


@pytest.mark.parametrize("variant", ["blip2_opt", "blip2_t5", "instructblip_vicuna"])
def test_a_prompt_that_ends_in_a_blank_is_tokenised_with_the_answer_behind_it(open_model, variant):
    model = open_model(variant)
    asked, caption = "What is in the picture? Answer: ", "a dog and a cat"
    prompt = prompt_text(model, asked, "en")
    tokens, _ = tokenize_caption(model, prompt, caption)
    before, whole = (model.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, asked + caption))
    assert before + tokens == whole
    assert model.tokenizer.decode(tokens) == f" {caption}"
    assert prompt_text(model, " ", "en") == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_neighbours_leave_a_row_as_it_is(open_model, variant):
    model = open_model(variant)
    languages = ("en", "fr", "es")
    together, _ = batch_of(model, TEXTS, languages=languages)
    states = caption_states(model, together)
    for row, caption in enumerate(TEXTS):
        alone, _ = batch_of(model, [caption], first=row, languages=[languages[row]])
        own = caption_states(model, alone)[0]
        start, count = alone.caption_start[0], len(alone.tokens[0])
        assert alone.tokens[0] == together.tokens[row]
        shift = together.caption_start[row]
        torch.testing.assert_close(
            states[row, shift - 1 : shift + count], own[start - 1 : start + count], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_position_sees_a_later_token_of_the_caption(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, ["An image of a dog", "An image of a cat and"])
    states = caption_states(model, batch)
    name = "decoder_input_ids" if model.parts.encoder_decoder else "input_ids"
    changed = batch.inputs[name].clone()
    # The second row continues the first: its last token, and the first row's, are changed.
    lasts = [batch.caption_start[row] + len(batch.tokens[row]) - 1 for row in (0, 1)]
    for row, last in enumerate(lasts):
        changed[row, last] = model.tokenizer(" horse", add_special_tokens=False).input_ids[0]
    assert not torch.equal(changed, batch.inputs[name])
    batch.inputs[name] = changed
    after = caption_states(model, batch)
    for row, last in enumerate(lasts):
        assert torch.equal(states[row, :last], after[row, :last])
        assert not torch.allclose(states[row, last], after[row, last])


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_are_the_image_s_positions_and_the_caption_s(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, TEXTS)
    for row, caption in enumerate(batch.tokens):
        held = {
            modality: [
                position
                for run in batch.spans
                if (run.row, run.modality) == (row, modality)
                for position in range(run.start, run.stop)
            ]
            for modality in ("image", "text")
        }
        start = batch.caption_start[row]
        assert held["text"] == list(range(start, start + len(caption)))
        ids = batch.inputs["decoder_input_ids" if model.parts.encoder_decoder else "input_ids"][row]
        assert ids[held["text"]].tolist() == caption
        if model.parts.image_in_sequence:
            assert held["image"] == ids[:start].eq(model.parts.image_token_id).nonzero()[:, 0].tolist() != []
        else:  # Mllama's token for the image is a special one, and the image is elsewhere
            assert held["image"] == []
    images = [run for run in batch.spans if run.modality == "image" and run.row == 0]
    assert all(first.stop < second.start for first, second in pairwise(images))
    assert len(images) > 1 or variant != "idefics3"


def test_what_follows_a_prompt_is_what_the_processor_learns_from(open_model):
    """PaliGemma's processor ends its prompt with a line, and gives the answer's tokens as `labels` where it is told."""
    model, caption = open_model("paligemma"), "dog and a cat."
    prompt = prompt_text(model, None, "en")
    features = model.processor(text=[prompt], images=[[picture(0)]], suffix=[caption], return_tensors="pt")
    learnt = features["labels"][0][features["labels"][0] >= 0].tolist()
    assert (
        tokenize_caption(model, prompt, caption)[0]
        == learnt[: -1 if learnt[-1] == model.tokenizer.eos_token_id else None]
    )


@pytest.mark.parametrize("variant", ["llava", "gemma3", "mllama", "qwen2_vl", "idefics3", "internvl", "paligemma"])
def test_a_base_checkpoint_without_a_template_is_asked_behind_its_image(tiny, variant, tmp_path):
    shutil.copytree(tiny(variant), tmp_path / "base")
    for file in (tmp_path / "base").glob("chat_template*"):
        file.unlink()
    for file in (tmp_path / "base").glob("*_config.json"):
        told = json.loads(file.read_text())
        told.pop("chat_template", None)
        file.write_text(json.dumps(told))
    model = load_model(str(tmp_path / "base"))
    assert not getattr(model.processor, "chat_template", None)
    assert model.contributions(picture(0), CAPTIONS[0], "dog").abs().sum() > 0


@pytest.mark.parametrize("variant", DECODERS)
def test_the_sequence_begins_once(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, TEXTS)
    bos = VARIANTS[variant].specials[0]
    if VARIANTS[variant].adds == "bos" or VARIANTS[variant].template[:1] == (bos,):
        ids = batch.inputs["input_ids"]
        assert ids[0].eq(model.tokenizer.bos_token_id).sum() == 1


def test_prompts_are_those_of_the_caption_s_language(open_model):
    model = open_model("llava")
    for language, prompt in PROMPTS.items():
        assert prompt in prompt_text(model, None, language)
        assert prompt in prompt_text(model, None, f"{language.upper()}-XX")
    for unknown in (None, "", "xx", "de"):
        assert prompt_text(model, None, unknown) == prompt_text(model, None, "en")
    assert prompt_text(model, "What?", "es") == "USER: <image>\nWhat? ASSISTANT:"
    assert "<image>" not in prompt_text(model, None, "en", image=False)
    assert prompt_text(open_model("paligemma"), "caption en", "en") == "<image>caption en"
    assert prompt_text(open_model("blip2_opt"), None, "fr") == PROMPTS["fr"]


def test_a_text_without_an_image_has_no_image_positions(open_model):
    model = open_model("qwen2_vl")
    prompt = prompt_text(model, None, "en", image=False)
    tokens, offsets = tokenize_caption(model, prompt, "a dog")
    batch = encode(model, [prompt], [None], [tokens], [offsets])
    assert [run.modality for run in batch.spans] == ["text"]
    assert "pixel_values" not in batch.inputs


@pytest.mark.parametrize("variant", ["paligemma", "llava"])
def test_what_a_processor_refuses_is_said_in_one_error(open_model, variant):
    model = open_model(variant)
    prompts = [prompt_text(model, None, "en", image=False), prompt_text(model, None, "en")]
    images = [None, None] if variant == "paligemma" else [picture(0), picture(1)]
    with pytest.raises(InputError, match="its processor refuses the batch"):
        encode(model, prompts, images, [[5], [5]], [[(0, 1)], [(0, 1)]])


@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "blip2_opt", "mllama"])
def test_a_prefix_is_the_beginning_of_the_answer(open_model, variant):
    model = open_model(variant)
    whole = model.contributions(picture(0), "An image of a dog.", "dog")
    torch.testing.assert_close(model.contributions(picture(0), "a dog.", "dog", prefix="An image of"), whole)
    again = model.contributions(picture(0), "An image of a dog.", "dog", prefix="an image of ")
    assert torch.equal(again, whole)
    assert not torch.equal(model.contributions(picture(0), "a dog.", "dog"), whole)


@pytest.mark.parametrize("variant", ["blip2_t5", "paligemma"])
def test_a_prefix_that_the_answer_can_t_begin_with_is_refused(open_model, variant):
    with pytest.raises(InputError, match="--prefix needs a decoder"):
        prompt_text(open_model(variant), None, "en", prefix="An image of")


def test_what_the_model_writes_follows_the_prefix(open_model, monkeypatch):
    seen = []
    generate = shard.generate
    monkeypatch.setattr(
        shard, "generate", lambda model, prompts, images, _: seen.extend(prompts) or generate(model, prompts, images, 4)
    )
    model = open_model("llava")
    analyse(model, samples(3), captions="generate", prefix="An image of")
    assert seen == [f"{prompt_text(model, None, 'en')} An image of"] * 3
