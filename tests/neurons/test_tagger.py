"""Taggers find what captions name, each in its languages; captions of other languages have no nouns."""

import pickle
import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.neurons import tagger
from mmray.neurons.concepts import TAGGERS, tagged_nouns
from mmray.neurons.language_id import ARTICLES, guess_language, language_code
from tests.bench.nouns import OTHERS, labelled, measure, templates
from tests.bench.nouns import TAGGERS as MEASURED


def concepts(caption, language=None, kind="hanta"):
    return [mention.concept for mention in tagged_nouns(caption, language, kind)]


@pytest.mark.parametrize(("texts", "recall", "precision"), [(templates, 0.99, 1.0), (labelled, 0.98, 0.97)])
def test_nearly_all_nouns_of_captions_are_found(texts, recall, precision):
    found = measure(MEASURED["hanta"], list(texts()))
    assert found[0] >= recall
    assert found[1] >= precision


def test_nouns_of_one_phrase_are_found_whatever_else_the_word_may_be():
    for noun in ("bear", "orange", "remote", "sink", "rose", "key", "wrench", "ostrich", "fly", "saw"):
        article = "An" if noun[0] in "aeiou" else "A"
        assert concepts(f"{article} {noun}.") == [noun]
    assert concepts("A bathroom with a toilet and sink.") == ["bathroom", "toilet", "sink"]


def test_an_adjective_before_its_noun_is_none():
    assert concepts("The red and yellow balloon is in the air.") == ["balloon", "air"]
    assert concepts("A big, red bus and a smaller one") == ["bus"]
    assert concepts("A girl brushes her teeth") == ["girl", "tooth"]
    assert concepts("Look at the dog.") == ["dog"]


@pytest.mark.parametrize("kind", TAGGERS)
def test_concepts_are_singular_and_no_lemmas_of_verbs(kind):
    caption = "Two dogs and a brown horse ride the buses near the White House."
    mentions = tagged_nouns(caption, "en", kind)
    assert [mention.concept for mention in mentions][:3] == ["dog", "horse", "bus"]
    assert [caption[mention.start : mention.stop] for mention in mentions][:3] == ["dogs", "horse", "buses"]
    assert concepts("Drawings and a painting on the wall", "en", kind)[1:] == ["painting", "wall"]
    for language in (None, "en-GB", "eng", "English"):
        assert tagged_nouns(caption, language, kind) == mentions
    assert tagged_nouns(caption, "fr", kind) == tagged_nouns("", "en", kind) == []


def test_german_captions_are_tagged_too():
    caption = "Zwei Kinder spielen mit einem roten Ball am Strand."
    for language in (None, "de", "de_AT", "German"):
        assert concepts(caption, language) == ["kind", "ball", "strand"]
    assert concepts(caption, "de", "textblob") == concepts(caption, None, "textblob") == []


@pytest.mark.parametrize("kind", TAGGERS)
def test_captions_of_other_languages_have_no_nouns(kind):
    for caption in (
        "La letra del alfabeto son las que tienen una vocal",
        "Una orca.",
        "Un chien court sur la plage.",
        "قطة على الطاولة",
        "Кошка на столе",
        "一只 猫 在 桌子 上",
    ):
        assert concepts(caption, None, kind) == []
    found = {concept for captions in OTHERS.values() for line in captions.split("\n") for concept in concepts(line)}
    assert not found & ARTICLES
    # Not even where a column says that they are English.
    assert not set(concepts("una foto de un oso", "en", kind)) & ARTICLES


def test_languages_are_told_apart_and_english_in_doubt():
    english = [text for texts in (templates, labelled) for text, _, _ in texts()]
    assert sum(guess_language(text) != "en" for text in english) <= len(english) / 100
    for code, captions in OTHERS.items():
        lines = captions.strip().splitlines()
        guesses = [guess_language(line) for line in lines]
        assert guesses.count("en") <= 1
        assert guesses.count(code) >= len(lines) / 2
    assert {guess_language(text) for text in ("", "...", "12", "\U0001f415")} == {"en"}
    assert language_code("un perro", "en-GB") == "en"
    assert language_code("a dog", "Spanish") == "es"


def test_pieces_of_words_are_not_tagged_nouns():
    for kind in TAGGERS:
        for caption in ("A cat can't see they'll eat the dog's food", "The cat’s dogs eat 'food' and I'm full"):
            assert set(concepts(caption, "en", kind)) == {"cat", "dog", "food"}


WORDS = (
    """dog don't “dog” the ... it's (cat) 's and/or 3.5 U.S. é - Hund <image> 🐕 狗 ß İ '' ` $5 n't DOGS T-shirt a"""
)
PARTS = st.sampled_from([*WORDS.split(" "), "\n", "\u202e"])


@given(st.lists(PARTS, max_size=8).map(" ".join), st.sampled_from(["en", "de", None]), st.sampled_from(list(TAGGERS)))
def test_tagged_mentions_are_apart_in_order_and_whole_words(caption, language, kind):
    mentions = tagged_nouns(caption, language, kind)
    words = {match.span() for match in re.finditer(r"\w+(?:-\w+)*", caption)}
    assert {(mention.start, mention.stop) for mention in mentions} <= words
    assert all(first.stop <= second.start for first, second in pairwise(mentions))


def test_a_model_in_the_working_directory_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language in tagger.LANGUAGES.values():
        (tmp_path / language.model).write_bytes(pickle.dumps("not a model"))
    tagger._model.cache_clear()
    assert concepts("A dog") == ["dog"]


@pytest.mark.parametrize("kind", TAGGERS)
def test_a_caption_without_blanks_takes_no_time(kind):
    began = time.perf_counter()
    for caption in ("xyzq" * 5_000, "a " + "Regen" * 2_000, "dog-" * 5_000, "a bear " * 2_000):
        for language in (None, "en", "de"):
            tagged_nouns(caption, language, kind)
    assert time.perf_counter() - began < 30
