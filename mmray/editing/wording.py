"""Captions with a noun replaced: the article agrees, a plural stays one, all else is to the letter as it was."""

from __future__ import annotations

import re

from mmray.neurons.concepts import find_forms

ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")
"""The English indefinite article at the end of what stands before a noun."""
VOWELS = "aeiou"


def names(text: str, word: str, language: str | None) -> bool:
    """Tell whether the text names the word, in any form that `find_forms` knows."""
    return bool(find_forms(text, frozenset({word.casefold()}), language))


def replace_noun(text: str, source: str, target: str, language: str | None) -> str:
    """Return the text with every mention of the source replaced by the target."""
    for mention in reversed(find_forms(text, frozenset({source.casefold()}), language)):
        before, noun, behind = text[: mention.start], text[mention.start : mention.stop], text[mention.stop :]
        word = target
        if noun.casefold() != source.casefold() and noun.endswith("s") and not word.endswith("s"):
            word += "s"
        if noun[:1].isupper() and before[-1:] != " ":
            word = word[:1].upper() + word[1:]
        if (language or "en").startswith("en"):
            before = ARTICLE.sub(rf"\g<1>{'n' if word[:1].casefold() in VOWELS else ''}\g<2>", before)
        text = before + word + behind
    return text
