"""Guess a caption's language, for data without a language column: English unless another is much more likely."""

from __future__ import annotations

import re
from functools import lru_cache

WORD = re.compile(r"[^\W\d_]+")
LEAD = 4.0
"""By how much another language's log-likelihood must exceed English; for a few words all languages are close."""
CLEAR_LEAD = 16.0
"""The same if most words exist in English too, as in `a skateboard` or `Drie boten in de haven`."""
NAMES = (
    "ar:Arabic bg:Bulgarian ca:Catalan cs:Czech da:Danish de:German el:Greek en:English es:Spanish fa:Persian "
    "fi:Finnish fr:French he:Hebrew hi:Hindi hu:Hungarian id:Indonesian it:Italian ja:Japanese ko:Korean nl:Dutch "
    "no:Norwegian pl:Polish pt:Portuguese ro:Romanian ru:Russian sv:Swedish th:Thai tr:Turkish uk:Ukrainian "
    "vi:Vietnamese zh:Chinese"
)
LANGUAGE_NAMES = dict(pair.split(":") for pair in NAMES.split())
"""Language code → English name."""
ARTICLES = frozenset(
    (
        *("un", "una", "une", "uno", "um", "uma", "el", "la", "los", "las", "le", "les", "il", "lo", "gli"),
        *("ein", "eine", "einen", "der", "das", "de", "het", "een", "en", "ett", "et", "det", "bir"),
    )
)
"""Articles of other languages that are not English words, as `die` is."""
CODES = {name.lower(): code for code, name in LANGUAGE_NAMES.items()} | {"eng": "en", "deu": "de", "ger": "de"}
ENOUGH = 1000
"""Characters that are examined."""


@lru_cache(maxsize=1024)
def guess_language(caption: str) -> str:
    """Return the code of a caption's most likely language, by py3langid's model and simplemma's dictionary."""
    # Imported here: loading the model takes half a second, which data with a language column does not need.
    import py3langid
    import simplemma

    caption = caption[:ENOUGH]
    words = WORD.findall(caption.lower())
    if not words:
        return "en"
    scores = dict(py3langid.rank(caption))
    best = max(scores, key=lambda code: scores[code])
    # Captions are short, and most data without a language column is English.
    lead = scores[best] - scores["en"]
    if lead <= (0 if words[0] in ARTICLES else LEAD):
        return "en"
    clear = lead > CLEAR_LEAD or words[0] in ARTICLES
    return str(best) if clear or simplemma.in_target_language(caption, lang="en") < 0.5 else "en"


def language_code(caption: str, language: str | None) -> str:
    """Return the code of a caption's language (`en` for en-GB, eng and English), guessed if `language` is None."""
    code = re.split("[-_]", language or guess_language(caption))[0].lower()
    return CODES.get(code, code)


def language_name(code: str) -> str:
    """Return a language's English name, or its code."""
    return LANGUAGE_NAMES.get(code, code)
