"""Which label's captions a text reads like."""

from mmray.neurons.labels.recognising import recogniser, words_of

KNOWN = recogniser(
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
