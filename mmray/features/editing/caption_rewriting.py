"""What a caption says round a noun: its noun phrase, the caption with another noun there, or without it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmray.neurons.concepts import Mention
from mmray.neurons.inflection import article

ARTICLE = re.compile(r"\b(?:an|a|the)\s+$", re.IGNORECASE)
"""An English article right before a noun."""
INDEFINITE = re.compile(r"\b(a)n?(\s+)$", re.IGNORECASE)
CONJUNCTIONS = {"en": " and ", "es": " y ", "fr": " et ", "zh": " 和 "}
"""What stands before the last thing of a list, by language."""
COMMA = ", "


def replaced(caption: str, words: Sequence[tuple[Mention, str]], language: str | None, *, agreeing: bool = True) -> str:
    """Return the caption with other words at these mentions, whose concept is the noun's singular in that language.

    A plural stays one, an English "a" or "an" agrees unless it is not to, and a capital letter stays one unless a blank
    stands before it.
    """
    for mention, word in sorted(words, key=lambda pair: -pair[0].start):
        before, noun, behind = caption[: mention.start], caption[mention.start : mention.stop], caption[mention.stop :]
        if noun.casefold() != mention.concept and noun.endswith("s") and not word.endswith("s"):
            word += "s"
        if noun[:1].isupper() and before[-1:] != " ":
            word = word[:1].upper() + word[1:]
        if agreeing and (language or "en").startswith("en"):
            before = INDEFINITE.sub(rf"\g<1>{article(word)[1:]}\g<2>", before)
        caption = before + word + behind
    return caption


def phrase(caption: str, mention: Mention) -> tuple[int, int]:
    """Return the characters of the noun with the article before it."""
    found = ARTICLE.search(caption, 0, mention.start)
    return (found.start() if found else mention.start), mention.stop


def without(caption: str, mention: Mention, language: str | None) -> set[str]:
    """Return the captions that leave the noun out of its list of things, and all else as it is; empty for no list."""
    start, stop = phrase(caption, mention)
    before, behind = caption[:start], caption[stop:]
    conjunction = CONJUNCTIONS.get((language or "en")[:2], CONJUNCTIONS["en"])
    found = set()
    for separator in (COMMA, conjunction):
        if behind.startswith(separator):
            found.add(before + behind[len(separator) :])
        if before.endswith(separator):
            kept = before[: -len(separator)]
            found.add(kept + behind)
            # "a frog, a bomb and a deer" without the deer is "a frog and a bomb".
            if separator == conjunction and COMMA in kept:
                first, _, last = kept.rpartition(COMMA)
                found.add(first + conjunction + last + behind)
    return found


def rest_kept(before: str, after: str, mention: Mention, language: str | None) -> bool:
    """Return whether all but one noun phrase is unchanged: what stands before and after it, to the letter.

    Something else may stand in its place, or nothing where it was one of a list.
    """
    start, stop = phrase(before, mention)
    between = len(after) - start - (len(before) - stop)
    kept = between >= 0 and after.startswith(before[:start]) and after.endswith(before[stop:])
    return kept or after in without(before, mention, language)
