"""Wording of prompts: paraphrases of the caption prompt, POPE's question, questions without an image."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mmray.errors import InputError
from mmray.neurons.inflection import with_article
from mmray.objects.statistics import ObjectStatistics
from mmray.storage import open_object

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "en": (
        "Describe this image in few words.",
        "Describe the image in a few words.",
        "Please describe the image in few words.",
        "In few words, describe the image.",
        "What is in the image?",
    ),
    "es": (
        "Describe esta imagen en pocas palabras.",
        "Por favor, describe la imagen en pocas palabras.",
        "En pocas palabras, describe la imagen.",
    ),
    "fr": (
        "Décris cette image en quelques mots.",
        "Décris l’image en peu de mots.",
        "En quelques mots, décris l’image.",
    ),
    # With blanks between words, at which the demo's tokenizer splits.
    "zh": (
        "用 几句 话 描述 这张 图 。",
        "请 用 几句 话 描述 这张 图片 。",
        "用 几句 话 描述 图片 。",
    ),
}
"""Other prompts for a caption by language, like the templates of MMEdit's E-IC. English serves other languages."""

PRESENCE = "Is there {thing} in the image?"
"""POPE's question."""
KIND = "What kind of thing is {thing}?"
TRANSLATION = "What is the {language} word for {name}?"
LANGUAGES = {"es": "Spanish", "fr": "French", "zh": "Chinese", "de": "German", "it": "Italian", "pt": "Portuguese"}
"""Languages that questions name."""


@dataclass(frozen=True)
class TextQuestion:
    """A question without an image. `draft`: a guess of the answer. `about`: it names an edited word."""

    name: str
    question: str
    draft: str
    about: bool = False


def paraphrases(language: str | None) -> tuple[str, ...]:
    """Return other prompts for a caption in a language."""
    return PARAPHRASES.get((language or "en")[:2].lower(), PARAPHRASES["en"])


def presence(name: str) -> str:
    """Return the question whether an object is in the image."""
    return PRESENCE.format(thing=with_article(name))


def text_questions(statistics: ObjectStatistics, words: frozenset[str], count: int, seed: int) -> list[TextQuestion]:
    """Return questions without an image about the data's objects: `count` random ones, and all about edited words.

    Questions about edited words are marked: locality leaves them out, because an edit may rightly change them.
    """
    made: list[TextQuestion] = []
    for name in statistics.vocabulary:
        about = name in words
        made.append(TextQuestion(f"kind of {name}", KIND.format(thing=with_article(name)), "", about))
        # A translation that the data knows is a good draft of the answer.
        for code, form in statistics.translations.get(name, {}).items():
            if code in LANGUAGES:
                question = TRANSLATION.format(language=LANGUAGES[code], name=name)
                made.append(TextQuestion(f"{code} of {name}", question, form, about))
    others = [question for question in made if not question.about]
    drawn = random.Random(seed).sample(others, min(count, len(others)))
    return drawn + [question for question in made if question.about]


def read_text_questions(uri: str) -> list[TextQuestion]:
    """Return the questions of a text file: one per line, optionally followed by a tab and the expected answer."""
    store, name = open_object(uri)
    try:
        content = store.read(name).decode()
    except FileNotFoundError:
        raise InputError(f"--text-questions {uri}: no such file; give one with a question per line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--text-questions {uri}: not UTF-8 ({error})") from None
    lines = [line.partition("\t") for line in content.splitlines() if line.strip()]
    return [
        TextQuestion(f"line {n}", question.strip(), answer.strip()) for n, (question, _, answer) in enumerate(lines)
    ]
