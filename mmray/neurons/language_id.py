"""The language that a caption looks like, for data that does not say: English unless much speaks for another."""

from __future__ import annotations

import re
from functools import lru_cache

WORD = re.compile(r"[^\W\d_]+")
LEAD = 4.0
"""How much likelier another language must be, as a difference of log-likelihoods; of a few words all are near."""
CLEAR_LEAD = 16.0
"""The same where most words are English words as well, as those of `a skateboard` or `Drie boten in de haven` are."""
LANGUAGE_NAMES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
ARTICLES = frozenset(
    (
        "un",
        "una",
        "une",
        "uno",
        "um",
        "uma",
        "el",
        "la",
        "los",
        "las",
        "le",
        "les",
        "il",
        "lo",
        "gli",
        "ein",
        "eine",
        "einen",
        "der",
        "das",
        "de",
        "het",
        "een",
        "en",
        "ett",
        "et",
        "det",
        "bir",
    )
)
"""Articles of other languages that are no English words. (Of those that are, such as `die`, nothing can be said.)"""
CODES = {name.lower(): code for code, name in LANGUAGE_NAMES.items()} | {"eng": "en", "deu": "de", "ger": "de"}


ENOUGH = 1000
"""Characters looked at."""


@lru_cache(maxsize=1024)
def guess_language(caption: str) -> str:
    """Return the code of the language that a caption looks like, by py3langid's model and simplemma's dictionary."""
    # Imported here: the model takes half a second that data with a language column need not spend.
    import py3langid
    import simplemma

    caption = caption[:ENOUGH]
    words = WORD.findall(caption.lower())
    if not words:
        return "en"
    scores = dict(py3langid.rank(caption))
    best = max(scores, key=lambda code: scores[code])
    lead = scores[best] - scores["en"]
    if lead <= (0 if words[0] in ARTICLES else LEAD):
        return "en"
    clear = lead > CLEAR_LEAD or words[0] in ARTICLES
    return str(best) if clear or simplemma.in_target_language(caption, lang="en") < 0.5 else "en"


def language_code(caption: str, language: str | None) -> str:
    """Return the code of a caption's language, `en` of en-GB, eng and English; a guess where none is named."""
    code = re.split("[-_]", language or guess_language(caption))[0].lower()
    return CODES.get(code, code)


def language_name(code: str) -> str:
    """Return a language's English name, or its code."""
    return LANGUAGE_NAMES.get(code, code)
