"""What the model writes is what it would write one token at a time, and every token knows its characters."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mmray.models import generation
from mmray.models.capture import capture_input
from mmray.models.generation import caption_of, generate, token_text
from mmray.models.loading import load
from mmray.models.norms import log_probability
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import demo_samples, picture

PROMPTS = ("en", "fr", "en")
"""Prompts of different lengths: French is the longest, and the others are padded."""


def step_by_step(model, prompt, image, count):
    """Return the raw greedy continuation and the smallest lead of a choice over the second best."""
    tokens, lead = [], []
    for _ in range(count):
        batch = encode(model, [prompt], [image], [tokens], [[(0, 0)] * len(tokens)])
        with torch.inference_mode():
            logits = model.network(**batch.to(model.device, model.network.dtype)).logits
        best = logits[0, batch.caption_start[0] + len(tokens) - 1].topk(2)
        tokens.append(int(best.indices[0]))
        lead.append(float(best.values[0] - best.values[1]))
    return tokens, lead


# Types whose image stands before the padding, has experts of its own, or needs a repaired output.
TYPES = ("blip", "ernie4_5_vl_moe", "git", "llama4")


@pytest.mark.parametrize("variant", [*VARIANTS, *TYPES])
def test_writes_what_single_steps_without_cache_or_padding_write(open_model, open_type, variant, monkeypatch):
    monkeypatch.setattr(generation, "PACKED_ROWS", len(PROMPTS))
    model = (open_type if variant in TYPES else open_model)(variant)
    prompts = [prompt_text(model, None, language) for language in PROMPTS]
    images = [picture(20), picture(21, 56, 40), picture(22)]
    written = generate(model, prompts, images, longest=5)
    special = set(model.tokenizer.all_special_ids)
    compared = 0
    for prompt, image, tokens in zip(prompts, images, written, strict=True):
        # An image's placeholder in the answer has no image: a step by step forward refuses it.
        steps = next((n for n, token in enumerate(tokens) if token == model.parts.image_token_id), len(tokens))
        expected, lead = step_by_step(model, prompt, image, min(5, steps + 1))
        for place, token in enumerate(expected):
            if lead[place] < 1e-3:
                break
            assert tokens[place : place + 1] == ([token] if token not in special else [])
            compared += 1
            if token in special:
                break
    assert compared >= 4


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if VARIANTS[variant].specials[0] == "<s>"])
def test_nothing_behind_a_special_token_is_kept(open_model, variant, monkeypatch):
    model = open_model(variant)
    bos, eos, pad = (model.tokenizer.convert_tokens_to_ids(token) for token in VARIANTS[variant].specials)
    start = [pad] if model.parts.encoder_decoder else []
    rows = [[60, 61, eos, pad], [eos, pad, pad, pad], [60, bos, 61, 62], [eos, 60, 61, 62]]
    # What follows the end is not the caption; the first forced token of an encoder-decoder may be special.
    expected = [[60, 61], [], [60], [60, 61, 62] if model.parts.encoder_decoder else []]
    rows = torch.tensor([[*start, *row] for row in rows])
    monkeypatch.setattr(type(model.network), "generate", lambda *_, **__: rows)
    prompt = prompt_text(model, None, "en")
    assert generate(model, [prompt] * 4, [picture(0)] * 4) == expected


@pytest.mark.parametrize("several", [False, True])
def test_nothing_behind_what_generation_stops_at_is_kept(open_model, monkeypatch, several):
    model = open_model("blip2_opt")
    stop = model.tokenizer("\n", add_special_tokens=False).input_ids[0]
    assert stop not in model.tokenizer.all_special_ids
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", [1, stop] if several else stop)
    rows = torch.tensor([[60, 61, stop, 62], [stop, 60, 61, 62], [60, 61, 62, 63]])
    monkeypatch.setattr(type(model.network), "generate", lambda *_, **__: rows)
    prompt = prompt_text(model, None, "en")
    assert generate(model, [prompt] * 3, [picture(0)] * 3) == [[60, 61], [], [60, 61, 62, 63]]


@pytest.mark.parametrize("variant", ["llava", "blip2_t5"])
def test_a_checkpoint_s_settings_of_generation_change_no_caption(open_model, tiny, tmp_path, variant):
    model, folder = open_model(variant), shutil.copytree(tiny(variant), tmp_path / "model")
    file = folder / "generation_config.json"
    settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True, "top_k": 2}
    settings |= {"suppress_tokens": list(range(60, 300)), "max_length": 3, "min_new_tokens": 9}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    other = load(str(folder))
    prompts, images = [prompt_text(model, None, "en")] * 2, [picture(1), picture(2)]
    assert generate(other, prompts, images, 8) == generate(model, prompts, images, 8)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        assert getattr(other.network.generation_config, name) == getattr(model.network.generation_config, name)


def test_the_demo_s_captions_are_its_greedy_choices(open_model):
    model = open_model("demo")
    found, _ = demo_samples(48)
    chosen = [next(s for s in found if s.language == language) for language in ("en", "zh", "fr", "es")]
    images = [picture(number, 96, 96) for number in range(4)]
    prompts = [prompt_text(model, None, sample.language) for sample in chosen]
    written = generate(model, prompts, images)
    assert all(3 < len(tokens) < 40 for tokens in written)
    batch = encode(model, prompts, images, written, [[(0, 0)] * len(tokens) for tokens in written])
    states = []
    with torch.inference_mode(), capture_input(model.norm, states.append):
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits
    for row, tokens in enumerate(written):
        start = batch.caption_start[row]
        predicted = logits[row, start - 1 : start - 1 + len(tokens)]
        assert predicted.argmax(1).tolist() == tokens
        probabilities = log_probability(model, states[0][row, start - 1 :][: len(tokens)], torch.tensor(tokens))
        expected = predicted.log_softmax(1)[range(len(tokens)), tokens]
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-4)


def check_offsets(text, offsets, count):
    assert len(offsets) == count
    assert all(first[1] == second[0] for first, second in pairwise(offsets))
    assert all(start <= stop for start, stop in offsets)
    assert [offsets[0][0], offsets[-1][1]] == [0, len(text)]
    assert "".join(text[start:stop] for start, stop in offsets) == text


@pytest.mark.parametrize("variant", ["demo", "llava", "qwen2_vl", "blip2_t5"])
@given(data=st.data())
def test_offsets_of_any_tokens_put_the_text_together(open_model, variant, data):
    model = open_model(variant)
    token = st.integers(0, len(model.tokenizer) - 1)
    tokens = data.draw(st.lists(token, min_size=1, max_size=12))
    text, offsets = caption_of(model, tokens)
    check_offsets(text, offsets, len(tokens))


def bytes_for_rare_characters():
    """Make a tokenizer like Llama's: what is not in its vocabulary is single bytes, and blanks stand before words."""
    words = ["▁", *"adogct,", "▁a", "do", "dog", "▁dog", "ca", "cat", "▁cat"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "a"), ("d", "o"), ("do", "g"), ("▁", "dog"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(open_model):
    """Return a model's tokenizer, one with single bytes, and one that takes blanks before punctuation away."""
    tidy = copy.deepcopy(open_model("llava").tokenizer)
    tidy.clean_up_tokenization_spaces = True
    tidy.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    own = {"bytes": bytes_for_rare_characters(), "tidy": tidy}
    assert tidy.decode(tidy("a dog , n't .").input_ids, skip_special_tokens=True) == "a dog,n't."
    return lambda name: replace(
        open_model("llava" if name in own else name),
        processor=SimpleNamespace(tokenizer=own.get(name) or open_model(name).tokenizer),
    )


TEXT = st.text(st.sampled_from("a dogct, 'n't. é犬熊🐕ß-"), min_size=1, max_size=20).map(str.strip).filter(bool)


@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "blip2_t5", "bytes", "tidy"])
@given(text=TEXT)
def test_offsets_of_generated_tokens_are_those_of_the_text_s_tokens(tokenizers, variant, text):
    model = tokenizers(variant)
    tokens, offsets = tokenize_caption(model, "x", text)
    written, decoded = caption_of(model, tokens)
    assert written == text
    check_offsets(text, decoded, len(tokens))
    for place in range(len(text)):
        first, second = (
            next(index for index, (_, stop) in enumerate(found) if stop > place) for found in (offsets, decoded)
        )
        assert first == second


def test_a_token_is_shown_as_people_read_it(open_model):
    model = open_model("llava")
    dog, blank = (model.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" dog", "  "))
    assert token_text(model, dog) == "do"
    assert token_text(model, blank) == "Ġ"


def test_the_unembedding_gets_states_that_cost_no_copy_of_its_weights(open_model):
    """Torch copies a Linear's weights once per row where its input is a strided view, as the last position's is."""
    model = open_model("llava")
    seen = []
    with model.network.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0])):
        generate(model, [prompt_text(model, None, "en")] * 2, [picture(0), picture(1)], longest=2)
    assert seen and all(states.is_contiguous() for states in seen)


def test_each_row_is_written_without_what_is_banned_for_it(open_model, monkeypatch):
    model = open_model("llava")
    prompt, images = prompt_text(model, None, "en"), [picture(0), picture(1), picture(2)]
    plain = generate(model, [prompt] * 3, images, longest=6)
    # One token, and a sequence of two; the last row is free.
    banned = [[plain[0][:1]], [plain[1][1:3]], []]
    written = generate(model, [prompt] * 3, images, longest=6, banned=banned)
    assert written[2] == plain[2]
    for image, own, before, after in zip(images[:2], banned, plain, written, strict=False):
        assert after != before
        # One image alone may have transformers' own ban, which is the same for all rows.
        with monkeypatch.context() as patch:
            patch.setattr(model.network.generation_config, "bad_words_ids", own)
            assert generate(model, [prompt], [image], longest=6) == [after]
