"""Long texts in windows: nothing is lost, nothing comes twice, and no window is longer than the model reads."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mmray.errors import InputError
from mmray.models.prompting import tokenize_caption
from mmray.models.tiny.texts import CONTEXT
from mmray.models.windows import LEAST, WINDOW, window_of, windows

TEXTS = st.text(st.sampled_from("ab dog cat. \n\téß犬🐕한"), max_size=300)
WORDS = st.lists(st.sampled_from(["dog", "cat,", "a", "größer", "犬", "🐕"]), min_size=1, max_size=120)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_windows_joined_are_the_text_and_none_is_too_long(open_text_model, family):
    model = open_text_model(family)

    @given(TEXTS)
    def check(text):
        pieces = windows(model, "", text, LEAST)
        assert "".join(pieces) == text
        assert all(len(tokenize_caption(model, "", piece)[0]) <= LEAST for piece in pieces)

    check()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_words_stay_whole_and_no_token_is_lost_or_doubled(open_text_model, family):
    model = open_text_model(family)

    @given(WORDS)
    def check(words):
        text = " ".join(words)
        pieces = windows(model, "", text, LEAST)
        assert all(piece.startswith(" ") for piece in pieces[1:])
        tokens = [token for piece in pieces for token in tokenize_caption(model, "", piece)[0]]
        assert tokens == tokenize_caption(model, "", text)[0]

    check()


def test_a_window_is_what_the_context_leaves(open_text_model):
    gpt2, bloom = open_text_model("gpt2"), open_text_model("bloom")
    assert window_of(gpt2, "") == CONTEXT - 1
    assert window_of(gpt2, "", 40) == 40
    assert window_of(gpt2, "", 400) == CONTEXT - 1
    assert window_of(bloom, "") == WINDOW
    assert window_of(bloom, "", 5000) == 5000
    with pytest.raises(InputError, match="shorten it"):
        window_of(gpt2, "dog " * 60)
