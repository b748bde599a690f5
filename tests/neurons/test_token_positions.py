"""A mention's place is the position before its first token, found by the characters that tokens cover."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.models.prompting import Batch, prompt_text, tokenize_caption
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.concepts import Mention, find_forms
from mmray.neurons.token_positions import locate_mentions, rank_in_row
from tests.support.samples import NOUNS, demo_samples


def tokenized(model, caption, language="en", start=7):
    """Return the caption as the one row of a batch, behind a prompt of `start` positions."""
    tokens, offsets = tokenize_caption(model, prompt_text(model, None, language), caption)
    return Batch({}, start + len(tokens), [start], [tokens], [offsets], [])


def check(model, batch, caption, mentions):
    """Compare places with what the tokens before and behind them spell."""
    places = locate_mentions(batch, 0, "s", mentions)
    assert len(places) == len(mentions)
    lead = len(caption) - len(caption.lstrip())
    for place, mention in zip(places, mentions, strict=True):
        index = place.position + 1 - batch.caption_start[0]
        tokens = batch.tokens[0]
        assert place.token == tokens[index]
        assert (place.row, place.sample_id, place.concept) == (0, "s", mention.concept)
        before, up_to = (model.tokenizer.decode(tokens[:stop]).lstrip() for stop in (index, index + 1))
        # Tokens of a part of a character spell the sign for an unknown one.
        assert caption[lead : mention.start].startswith(before.rstrip("�").rstrip())
        assert len(before.rstrip("�")) + lead <= mention.start
        assert len(up_to) + lead > mention.start


def test_in_the_demo_s_captions_of_every_language(open_model):
    model = open_model("demo")
    samples, nouns = demo_samples(96)
    counted = dict.fromkeys(("en", "es", "fr", "zh"), 0)
    for sample in samples:
        mentions = nouns.find(sample.caption, sample.language, sample.objects)
        check(model, tokenized(model, sample.caption, sample.language), sample.caption, mentions)
        counted[sample.language] += len(mentions)
    assert all(count >= 10 for count in counted.values())


PIECES = [*sorted(NOUNS), "dogs", "two", "犬", "熊猫", "é", "🐕", ",", "(", "naïve", "  ", "\t", "-", "’s"]
CAPTION = st.lists(st.sampled_from(PIECES), min_size=1, max_size=10).map(" ".join)


@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "gemma3", "blip2_t5", "blip2_opt", "paligemma"])
@given(caption=CAPTION)
def test_in_any_caption(open_model, variant, caption):
    model = open_model(variant)
    mentions = find_forms(caption, NOUNS | {"犬", "熊猫", "熊"}, "en")
    expected = len(re.findall(rf"\b(?:{'|'.join(NOUNS)}|dogs)\b", caption)) + len(re.findall("犬|熊", caption))
    assert len(mentions) == expected
    check(model, tokenized(model, caption), caption, mentions)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_noun_that_begins_the_caption_is_predicted_by_what_stands_before(open_model, variant):
    model = open_model(variant)
    batch = tokenized(model, "dog and dog", start=1)
    first, second = locate_mentions(batch, 0, "s", [Mention("dog", 0, 3), Mention("dog", 8, 11)])
    # A family whose tokenizer writes the blank after the prompt as a token predicts the noun from it.
    assert first.position == batch.offsets[0].count((0, 0))
    assert second.position > first.position
    assert model.tokenizer.decode(batch.tokens[0][second.position :]).strip() == "dog"


def test_all_mentions_of_a_row_have_places_and_ranks(open_model):
    batch = tokenized(open_model("llava"), "a dog, a dog, a cat")
    places = locate_mentions(batch, 0, "s", find_forms("a dog, a dog, a cat", NOUNS, "en"))
    assert [place.concept for place in places] == ["dog", "dog", "cat"]
    assert len({place.position for place in places}) == 3
    assert rank_in_row(places) == [0, 1, 2]
    assert rank_in_row([]) == []


def test_a_mention_behind_the_last_token_has_no_place(open_model):
    batch = tokenized(open_model("llava"), "a dog")
    assert locate_mentions(batch, 0, "s", [Mention("cat", 9, 12)]) == []
