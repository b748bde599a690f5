"""Objects found by their names in any language, in the plural, and by synonyms."""

import json
from pathlib import Path

import pytest

from mmray.errors import InputError
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.words import ObjectWords, read_synonyms

TRANSLATIONS = {"dog": {"en": "dog", "es": "perro"}, "bird": {"es": "pájaro", "zh": "鸟"}}


def test_objects_are_known_by_every_name() -> None:
    naming = ObjectLexicon(("dog", "Hot Dog", "bird"), TRANSLATIONS, ObjectWords({"dog": ("puppy", "hound")}))
    found = [m.concept for m in naming.mentions("Two dogs, a puppy, a hot dog and Birds", "en")]
    assert found == ["dog", "dog", "hot dog", "bird"]
    assert naming.named("Un perro y un pájaro, no un dog", "es") == {"dog", "bird"}
    assert naming.named("图片里有鸟。", "zh") == {"bird"}
    assert naming.named("a hotdog, dogma", "en") == set()


def test_a_name_is_never_anothers_synonym() -> None:
    naming = ObjectLexicon(("cat", "kitten"), {}, ObjectWords({"cat": ("kitten",)}))
    assert naming.named("a kitten", "en") == {"kitten"}


def test_words_of_a_language_are_the_objects_they_name() -> None:
    naming = ObjectLexicon(("dog", "bird"), TRANSLATIONS)
    assert naming.canonical("Perro", "es") == "dog"
    assert naming.canonical("perro", "en") == naming.canonical("perro", None) == "perro"
    assert naming.canonical("dog", "es") == "dog"


@pytest.mark.parametrize("content", [{"dog": ["puppy"], "bird": []}, [["dog", "puppy"], ["bird"]]])
def test_synonym_files_of_both_forms(tmp_path: Path, content: object) -> None:
    (tmp_path / "words.json").write_text(json.dumps(content))
    assert read_synonyms(str(tmp_path / "words.json")) == {"dog": ("puppy",), "bird": ()}


@pytest.mark.parametrize("content", ["{", "3", "[3]"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(InputError, match=r"words\.json: not of the form"):
        read_synonyms(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match="no such file"):
        read_synonyms(str(tmp_path / "none.json"))
