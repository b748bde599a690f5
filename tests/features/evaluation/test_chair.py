"""CHAIR compared with an implementation of its rules that shares nothing with the package but the table of words."""

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textblob.en.inflect import singularize

from mmray.errors import InputError
from mmray.features.evaluation.chair import chair
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.settings import measure_settings
from mmray.features.evaluation.summary import summarise
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.words import COCO, NONE, ObjectWords, coco_words, open_words, read_synonyms
from tests.support.chair_reference import ANIMALS, ONE_OF, TABLE, WORDS, Reference, plural, reference

TRAPS = (
    [f"{age} {animal}" for age in ("baby", "adult") for animal in ANIMALS]
    + [f"{age} {animal}s" for age in ("baby", "adult") for animal in ANIMALS if animal != "sheep"]
    + ["passenger train", "passenger trains", "passenger jet", "passenger bus", "passenger train track", "baby puppy"]
    + ["toilet seat", "toilet seats", "toilet", "seat", "seat of the toilet", "bow tie", "bow ties", "bow", "baby"]
    + ["home plate", "train track", "train tracks", "train", "dining table", "dining", "hot", "hot dog house", "dogs"]
    + ["skiing", "seated", "tied", "bare", "training", "skateboarding", "groomed", "monitoring", "riding", "booked"]
    + ["bowling", "biking", "a", "the", "red"]
)


def measured(words: ObjectWords, captions: Sequence[str], truths: Sequence[set[str]]) -> tuple[float | None, ...]:
    lexicon, rows = ObjectLexicon((), {}, words), MeasurementBuffer()
    for number, (caption, truth) in enumerate(zip(captions, truths, strict=True)):
        chair(rows, lexicon, str(number), frozenset(truth), None, caption, caption)
    found = summarise(rows.tables()["measurements"], measure_settings(draws=2))
    return found["chair_s"]["after"], found["chair_i"]["after"]


def generated() -> tuple[list[str], list[set[str]]]:
    """Sentences that use every word in the singular and in the plural, and every rule; and what is in their images."""
    generator = random.Random(0)
    used = [*WORDS, *map(plural, WORDS), *TRAPS]
    generator.shuffle(used)
    sentences = []
    for some in (used[start : start + 3] for start in range(0, len(used), 3)):
        sentence = f"There is a {some[0]}, next to {', and '.join(some[1:])}."
        sentences.append(sentence + generator.choice([" ", " A man with his dog."]))
    truths = [set(generator.sample(sorted(TABLE), 40)) for _ in sentences]
    return sentences, truths


def test_chair_is_that_of_an_independent_implementation() -> None:
    sentences, truths = generated()
    assert len(sentences) > 250
    assert measured(coco_words(), sentences, truths) == pytest.approx(reference().chair(sentences, truths), abs=1e-12)


def test_with_the_singulars_of_the_published_code_only_its_known_faults_differ() -> None:
    """Its singulars are those of textblob's function, which makes bu of bus and ty of ties."""
    wrong = {word for word in {*ONE_OF, *ONE_OF.values()} if singularize(word) != ONE_OF.get(word, word)}
    assert {"bus", "ties"} <= wrong
    published = Reference(TABLE, singularize)
    kept = Reference(TABLE, lambda word: ONE_OF.get(word, word) if word in wrong else singularize(word))
    sentences, truths = generated()
    found = measured(coco_words(), sentences, truths)
    assert found == pytest.approx(kept.chair(sentences, truths), abs=5e-4)
    right = [number for number, text in enumerate(sentences) if not wrong & set(re.findall(r"[a-z]+", text.lower()))]
    assert len(right) > 100
    sentences, truths = [sentences[number] for number in right], [truths[number] for number in right]
    assert measured(coco_words(), sentences, truths) == pytest.approx(published.chair(sentences, truths), abs=5e-4)


PIECES = st.sampled_from([*WORDS, *map(plural, WORDS), *TRAPS, *TRAPS])
SENTENCES = st.lists(st.tuples(PIECES, st.sampled_from([" ", ", ", ". ", " and ", " of the "])), max_size=9).map(
    lambda parts: "".join(word + between for word, between in parts)
)


@given(SENTENCES, st.booleans())
def test_mentions_are_those_of_the_independent_implementation(sentence: str, title: bool) -> None:
    # Punctuation between the two parts the reference: a double word is one of neighbouring tokens, as published.
    text = re.sub(r"[,.]", "", sentence.title() if title else sentence)
    found = [mention.concept for mention in ObjectLexicon((), {}, coco_words()).mentions(text, "en")]
    assert found == reference().mentions(text)


def test_the_table_is_of_coco_s_objects() -> None:
    assert len(TABLE) == 80
    assert len(WORDS) == len(set(WORDS)) > 300
    assert all(word == word.casefold().strip() for word in WORDS)
    assert {"person", "hair drier", "tv", "wine glass", "sports ball", "potted plant", "hot dog"} <= set(TABLE)


def lines(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(", ".join(row) for row in rows) + "\n"


def test_the_published_form_of_synonyms_is_read_as_well_as_json(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(lines([name, *words] for name, words in TABLE.items()) + "\n")
    (tmp_path / "synonyms.json").write_text(json.dumps(TABLE))
    (tmp_path / "few.txt").write_text("Dog, puppy,  hot dog \n\ndog,Pup\ndragon\n")
    assert read_synonyms(str(tmp_path / "few.txt")) == {"dog": ("puppy", "hot dog", "pup"), "dragon": ()}
    sentences, truths = generated()
    wanted = measured(coco_words(), sentences, truths)
    for name in ("synonyms.txt", "synonyms.json"):
        # COCO's rules go with any words for COCO's objects.
        assert measured(open_words(str(tmp_path / name), ["dog"]), sentences, truths) == wanted
    assert not open_words(str(tmp_path / "few.txt"), ["dog"]).phrases
    (tmp_path / "broken.txt").write_bytes(b"dog, \xff\n")
    with pytest.raises(InputError, match=r"broken\.txt: not of the form"):
        read_synonyms(str(tmp_path / "broken.txt"))


def test_coco_s_words_are_the_default_for_coco_s_objects() -> None:
    assert open_words(None, ["dog", "hot dog"]) is coco_words() is open_words(COCO, ["dragon"])
    assert open_words(None, ["dog", "dragon"]) == open_words(None, []) == open_words(NONE, ["dog"]) == ObjectWords()


def test_objects_that_no_sample_has_are_looked_for() -> None:
    lexicon = ObjectLexicon(["dog"], {}, open_words(None, ["dog"]))
    assert lexicon.named("a toaster, a laptop and a dog", "en") == {"toaster", "laptop", "dog"}
    # Names of the data are found whatever a table lists.
    lexicon = ObjectLexicon(["dog", "dragon"], {}, open_words(COCO, ["dog", "dragon"]))
    assert lexicon.named("a toaster, a dragon and a puppy", "en") == {"toaster", "dragon", "dog"}
