"""Which label's captions a text reads like."""

import hypothesis.strategies as st
from hypothesis import given

from mmray.features.selectivity.reply_language import train_classifier, words_of

KNOWN = train_classifier(
    [
        ("en", "An image of a dog and a cat."),
        ("es", "Una imagen de perro y gato."),
        ("fr", "Une image de chien et chat."),
        ("zh", "图片 里 有 狗 和 猫 。"),
    ]
)


def test_texts_of_each_label():
    assert KNOWN.label("a dog and an image") == "en"
    assert KNOWN.label("imagen de gato, de perro") == "es"
    assert KNOWN.label("Une image de chat") == "fr"
    assert KNOWN.label("有猫") == "zh"


def test_words_that_nobody_knows_tell_nothing():
    assert KNOWN.label("xyzzy 123") is None
    assert KNOWN.label("") is None
    assert KNOWN.share("xyzzy", "en") is None
    assert KNOWN.label("xyzzy perro") == "es"


def test_the_share_of_words():
    assert KNOWN.share("perro y dog", "es") == 2 / 3
    assert KNOWN.share("perro y dog", "en") == 1 / 3


def test_scripts_without_blanks_are_read_by_character():
    assert words_of("有狗 dog") == ["有", "狗", "dog"]


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_sizes_of_corpora_decide_nothing(many, few):
    """A word that one label has is read as that, however rare; one that two labels lack tells nothing between them."""
    captions = [("en", "dog the")] * many + [("es", "perro el")] * few + [("fr", "chat le un une")] * max(many, few)
    known = train_classifier([*captions, ("en", "rare"), ("es", "raro")])
    for word, label, other in (("rare", "en", "es"), ("raro", "es", "en")):
        assert known.label(word) == label
        assert known.share(word, label) == 1
        assert known.share(word, other) == 0
        assert known.label(f"{word} chat") != other
        assert known.label(f"{word} chat le") != other
