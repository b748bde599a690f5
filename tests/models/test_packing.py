"""Rows that several texts of one image share: each text's logits are those of a row of its own, in every family."""

import pytest
import torch

from mmray.models import packing
from mmray.models.packing import encode_shared
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import CAPTIONS, picture

# T5 and Mllama have no image in the decoder's sequence.
SHARING = [name for name in VARIANTS if not name.endswith("_t5") and name != "mllama"]
# All others may branch within the prompt: these read the prompt before or together with the image.
SAME_PROMPT = {"paligemma", "instructblip_vicuna", "blip2_opt"}


def encoded(model, languages=("en", "en", "en")):
    """Three captions of one picture, two of another, and one of a third."""
    texts = [CAPTIONS[0], "An image of a dog.", CAPTIONS[7], CAPTIONS[2], CAPTIONS[0], CAPTIONS[4]]
    first, second = picture(1), picture(2)
    images = [first, first, first, second, second, picture(3)]
    prompts = [prompt_text(model, None, language) for language in (*languages, *languages)]
    pairs = [tokenize_caption(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    given = (prompts, images, [tokens for tokens, _ in pairs], [offsets for _, offsets in pairs])
    return encode_shared(model, *given), encode(model, *given)


def caption_logits(model, batch):
    """The logits that predict each caption's tokens and its end."""
    with torch.inference_mode():
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits.flatten(0, 1)
    return [
        logits[[batch.flat(row, start - 1 + index) for index in range(len(tokens) + 1)]]
        for row, (start, tokens) in enumerate(zip(batch.caption_start, batch.tokens, strict=True))
    ]


@pytest.mark.parametrize("variant", SHARING)
@pytest.mark.parametrize("languages", [("en", "en", "en"), ("en", "en", "fr")])
def test_a_text_in_a_shared_row_is_as_alone(open_model, variant, languages):
    model = open_model(variant)
    shared, alone = encoded(model, languages)
    # With the same prompt only, en and fr have rows of their own.
    rows = 4 if variant in SAME_PROMPT and len(set(languages)) > 1 else 3
    assert (shared.rows, alone.rows) == (rows, 6)
    assert shared.caption_start == alone.caption_start
    assert shared.spans == alone.spans
    for one, other in zip(caption_logits(model, shared), caption_logits(model, alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "idefics3"])
def test_a_prefix_is_in_the_row_once(open_model, variant):
    model = open_model(variant)
    shared, alone = encoded(model)
    ids = shared.inputs["input_ids"]
    places = [
        [shared.flat(row, p) for p in range(start + len(tokens))]
        for row, (start, tokens) in enumerate(zip(shared.caption_start, shared.tokens, strict=True))
    ]
    for row, own in enumerate(places):
        sequence = alone.inputs["input_ids"][row, : len(own)]
        assert torch.equal(ids.flatten()[own], sequence)
    # The first two captions begin with the same words.
    common = next(n for n, (a, b) in enumerate(zip(*shared.tokens[:2], strict=False)) if a != b)
    assert common > 3
    start = shared.caption_start[0]
    assert [a == b for a, b in zip(*places[:2], strict=False)] == [n < start + common for n in range(len(places[1]))]
    tokens = {place for own in places[:3] for place in own}
    assert len(tokens) < sum(map(len, places[:3])) - 2 * start


@pytest.mark.parametrize(
    ("variant", "fault"),
    [("llava", "mask"), ("llava", "positions"), ("qwen2_vl", "rotary"), ("gemma3", "block"), ("paligemma", "block")],
)
def test_a_row_that_is_written_wrongly_shows(open_model, monkeypatch, variant, fault):
    """So the comparisons above can fail."""
    model = open_model(variant)
    visible, positions = packing._visible, packing._position_ids
    if fault == "mask":
        # As a packed document: every token sees all before it in the row.
        monkeypatch.setattr(packing, "_visible", lambda tree, total, _: torch.ones(total, total).tril().bool().numpy())
    elif fault == "block":
        monkeypatch.setattr(packing, "_visible", lambda tree, total, _: visible(tree, total, ()))
    else:
        monkeypatch.setattr(
            packing, "_position_ids", lambda *call: torch.arange(call[3]).expand(positions(*call).shape)
        )
    shared, alone = encoded(model)
    pairs = zip(caption_logits(model, shared), caption_logits(model, alone), strict=True)
    assert max(float((one - other).abs().max()) for one, other in pairs) > 1e-2


def test_a_sequence_longer_than_a_sliding_window_has_its_own_row(loaded_with):
    model = loaded_with("gemma3", sliding_window=8)
    assert encoded(model)[0] is None
