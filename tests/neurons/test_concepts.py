"""Nouns are found with their characters: every one, the longest, inflected, in scripts without blanks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import InputError
from mmray.neurons import concepts
from mmray.neurons.concepts import (
    TAGGERS,
    NounSource,
    find_forms,
    noun_source,
    read_lexicon,
)
from mmray.neurons.inflection import lemma
from tests.support.samples import demo_samples


def found(caption, *forms, language="en"):
    return [
        (mention.concept, mention.start, mention.stop) for mention in find_forms(caption, frozenset(forms), language)
    ]


def test_every_occurrence_is_a_mention():
    assert found("a dog, a dog and a Dog", "dog") == [("dog", 2, 5), ("dog", 9, 12), ("dog", 19, 22)]


def test_plurals_and_inflections_belong_to_the_listed_form():
    assert found("two dogs and mice", "dog", "mouse") == [("dog", 4, 8), ("mouse", 13, 17)]
    assert found("unos perros", "perro", language="es") == [("perro", 5, 11)]
    assert found("des chevaux", "cheval", language="fr") == [("cheval", 4, 11)]
    assert found("her glasses", "glasses", "glass") == [("glasses", 4, 11)]
    assert found("a dog", "dogs") == []


def test_parts_of_words_are_no_mentions():
    assert found("a hotdog, the dogma, dog-like", "dog", "hot") == []
    assert found("the dog's bowl", "dog", "bowl") == [("dog", 4, 7), ("bowl", 10, 14)]
    assert found("l’image du chien", "image", "chien", language="fr") == [("image", 2, 7), ("chien", 11, 16)]


def test_the_longest_of_overlapping_forms_is_taken():
    forms = ("hot dog", "dog", "dog house", "hot dog stand", "hot")
    assert found("a hot dog", *forms) == [("hot dog", 2, 9)]
    assert found("two hot dogs", *forms) == [("hot dog", 4, 12)]
    assert found("a hot dog stand", *forms) == [("hot dog stand", 2, 15)]
    assert found("a hot dog house", *forms) == [("hot dog", 2, 9)]
    assert found("the dog is hot", *forms) == [("dog", 4, 7), ("hot", 11, 14)]
    assert found("a t-shirt and a shirt", "t-shirt", "shirt") == [("t-shirt", 2, 9), ("shirt", 16, 21)]


def test_scripts_without_blanks_are_searched_for_substrings():
    assert found("图片里有熊猫和熊。", "熊", "熊猫", language="zh") == [("熊猫", 4, 6), ("熊", 7, 8)]
    assert found("犬と犬", "犬", language="ja") == [("犬", 0, 1), ("犬", 2, 3)]
    assert found("หมาและแมว", "แมว", language="th") == [("แมว", 6, 9)]
    # Other scripts stand next to them; casefold makes ß two letters, and İ two.
    assert found("die Straße der İ 犬 und ein Hund", "犬", "hund", language="de") == [("犬", 17, 18), ("hund", 27, 31)]


WORDS = st.sampled_from(["dog", "Dogs", "hot dog", "犬", "熊猫", "熊", "ß", "İ", "a", "and", ",", "!", "é", "\n", "🐕"])
FORMS = frozenset({"dog", "hot dog", "犬", "熊猫", "熊", "cat"})


@given(st.lists(st.tuples(WORDS, st.sampled_from(["", " ", "  "])), max_size=10))
def test_mentions_are_apart_in_order_and_spell_their_form(parts):
    caption = "".join(word + blank for word, blank in parts)
    mentions = find_forms(caption, FORMS, "en")
    for mention in mentions:
        text = caption[mention.start : mention.stop].casefold()
        assert text == mention.concept or (text, mention.concept) in {("dogs", "dog"), ("hot dogs", "hot dog")}
    assert all(first.stop <= second.start for first, second in pairwise(mentions))
    # Han forms are found wherever they stand.
    assert sum(mention.concept in ("熊猫", "熊") for mention in mentions) == caption.count("熊")
    assert sum(mention.concept == "犬" for mention in mentions) == caption.count("犬")


def test_an_unknown_language_has_no_inflections():
    assert lemma("dogs", "xx") == "dogs"
    assert found("two dogs and a dog", "dog", language="xx") == [("dog", 15, 18)]
    assert lemma("dogs", None) == lemma("dogs", "en-US") == "dog"


def test_objects_are_looked_for_in_the_caption_s_language():
    translations = {"dog": {"es": "perro", "zh": "狗"}, "cat": {"es": "gato"}}
    source = noun_source("auto", ["dog", "cat", "fish"], translations)
    assert source.kind == "objects"

    def concepts(caption, language, objects, **options):
        return [mention.concept for mention in source.find(caption, language, objects, **options)]

    assert concepts("a Dog and a cat", "en", ("dog",)) == ["dog"]
    assert concepts("un perro y un gato", "es", ("dog", "cat")) == ["perro", "gato"]
    assert concepts("una foto de dog", "es", ("dog",)) == []
    assert concepts("图片里有狗", "zh", ("dog", "cat")) == ["狗"]
    assert concepts("ein dog", "de", ("dog",)) == ["dog"]
    assert concepts("a dog", None, ("dog",)) == ["dog"]
    assert concepts("a dog", "en", ()) == concepts("a dog", "en", None) == []
    # What the model writes may be in no list of the image's objects.
    assert concepts("a fish and a dog", "en", ("dog",), generated=True) == ["fish", "dog"]
    assert concepts("un gato", "es", (), generated=True) == ["gato"]


def test_a_lexicon_has_nouns_of_all_languages_and_of_one(tmp_path):
    path = tmp_path / "nouns.txt"
    path.write_text("# animals\nDog\n\nperro\tes\n hot dog \nGift\tde\n", encoding="utf-8")
    assert read_lexicon(path) == {
        None: frozenset({"dog", "hot dog"}),
        "es": frozenset({"perro"}),
        "de": frozenset({"gift"}),
    }
    source = noun_source(str(path), ["dog"], {})
    assert [mention.concept for mention in source.find("A gift for a dog", "en", None)] == ["dog"]
    assert [mention.concept for mention in source.find("Ein Gift für dog", "de", None)] == ["gift", "dog"]
    assert [mention.concept for mention in source.find("A gift and perro", None, ("gift",))] == []


def test_sources_that_can_t_be_are_refused_in_one_line(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n\tes\n")
    for nouns, vocabulary, reason in (
        (str(tmp_path / "none.txt"), [], "no such file"),
        (str(empty), [], "no noun in it"),
        ("objects", [], "no objects column"),
    ):
        with pytest.raises(InputError, match=reason) as refusal:
            noun_source(nouns, vocabulary, {})
        assert "\n" not in str(refusal.value)
        assert nouns in str(refusal.value)
    assert noun_source("auto", [], {}).kind == "hanta"
    assert noun_source("textblob", ["dog"], {}).kind == "textblob"


def test_a_lexicon_s_language_stands_behind_a_tab(tmp_path):
    path = tmp_path / "nouns.txt"
    path.write_text("dog\nlion en\n")
    with pytest.raises(InputError, match=r"nouns\.txt, line 2: 'lion en' ends in the language 'en'.*tab") as refusal:
        read_lexicon(path)
    assert "\n" not in str(refusal.value)
    path.write_text("musk ox\nlion  \ten\nphoto id\t\n")
    assert read_lexicon(path) == {None: {"musk ox", "photo id"}, "en": {"lion"}}


def test_every_object_of_the_demo_is_found_where_its_language_names_it():
    samples, nouns = demo_samples(96)
    assert {sample.language for sample in samples} == {"en", "es", "fr", "zh"}
    for sample in samples:
        mentions = nouns.find(sample.caption, sample.language, sample.objects)
        assert len(mentions) == len(sample.objects)
        for mention in mentions:
            assert sample.caption[mention.start : mention.stop].casefold() == mention.concept


def test_the_digest_is_that_of_what_decides():
    def sources():
        return [
            NounSource("objects", ("dog",)),
            NounSource("objects", ("dog", "cat")),
            NounSource("objects", ("dog",), {"dog": {"es": "perro"}}),
            NounSource("objects", ("dog",), {"dog": {"es": "can"}}),
            NounSource("lexicon", lexicon={None: frozenset({"dog"})}),
            NounSource("lexicon", lexicon={"en": frozenset({"dog"})}),
            NounSource("lexicon", lexicon={None: frozenset({"dog", "cat", "ball", "hat"})}),
            NounSource("textblob"),
            NounSource("hanta"),
        ]

    digests = [source.digest(generated=True) for source in sources()]
    assert len(set(digests)) == len(digests)
    assert digests == [source.digest(generated=True) for source in sources()]
    # Of the data's own captions only the objects of the same sample are looked for.
    digests = [source.digest(generated=False) for source in sources()]
    assert len(set(digests)) == len(digests) - 1
    assert digests[0] == digests[1]


def test_another_tagger_is_another_source(monkeypatch):
    before = {kind: NounSource(kind).digest(generated=False) for kind in (*TAGGERS, "lexicon")}
    monkeypatch.setattr(concepts, "version", lambda name: f"{name} of another day")
    after = {kind: NounSource(kind).digest(generated=False) for kind in before}
    assert {kind for kind in before if before[kind] != after[kind]} == set(TAGGERS)
