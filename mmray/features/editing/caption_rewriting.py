"""Rewrite captions around a noun: find its noun phrase, replace the noun, or leave it out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmray.neurons.concepts import Mention
from mmray.neurons.inflection import article

ARTICLE = re.compile(r"\b(?:an|a|the)\s+$", re.IGNORECASE)
"""An English article right before a noun."""
INDEFINITE = re.compile(r"\b(a)n?(\s+)$", re.IGNORECASE)
CONJUNCTIONS = {"en": " and ", "es": " y ", "fr": " et ", "zh": " 和 "}
"""The word before the last item of a list, by language."""
COMMA = ", "


def replaced(caption: str, words: Sequence[tuple[Mention, str]], language: str | None, *, agreeing: bool = True) -> str:
    """Return the caption with other words at these mentions; a mention's concept is the noun's singular.

    A plural stays a plural. With `agreeing`, an English "a" or "an" is adapted to the new word. The new word is
    capitalised where the noun was, unless a blank precedes it.
    """
    # From the last mention to the first, so that the characters of earlier ones stay where they are.
    for mention, word in sorted(words, key=lambda pair: -pair[0].start):
        before, noun, after = caption[: mention.start], caption[mention.start : mention.stop], caption[mention.stop :]
        # An s that the singular lacks is taken for a plural; after irregular ones (mice) the word stays singular.
        if noun.casefold() != mention.concept and noun.endswith("s") and not word.endswith("s"):
            word += "s"
        if noun[:1].isupper() and before[-1:] != " ":
            word = word[:1].upper() + word[1:]
        if agreeing and (language or "en").startswith("en"):
            # Keeps the article's own first letter, so that a capital A stays one.
            before = INDEFINITE.sub(rf"\g<1>{article(word)[1:]}\g<2>", before)
        caption = before + word + after
    return caption


def phrase(caption: str, mention: Mention) -> tuple[int, int]:
    """Return the start and stop of the noun with the article before it, in characters."""
    found = ARTICLE.search(caption, 0, mention.start)
    return (found.start() if found else mention.start), mention.stop


def without(caption: str, mention: Mention, language: str | None) -> set[str]:
    """Return the captions that drop the noun from a list of things and change nothing else; empty if it is in none."""
    start, stop = phrase(caption, mention)
    before, after = caption[:start], caption[stop:]
    conjunction = CONJUNCTIONS.get((language or "en")[:2], CONJUNCTIONS["en"])
    found = set()
    # The separator on either side may go with the noun, so there may be several wordings.
    for separator in (COMMA, conjunction):
        if after.startswith(separator):
            found.add(before + after[len(separator) :])
        if before.endswith(separator):
            kept = before[: -len(separator)]
            found.add(kept + after)
            # "a frog, a bomb and a deer" without the deer is "a frog and a bomb".
            if separator == conjunction and COMMA in kept:
                first, _, last = kept.rpartition(COMMA)
                found.add(first + conjunction + last + after)
    return found


def rest_kept(before: str, after: str, mention: Mention, language: str | None) -> bool:
    """Return whether all text outside one noun phrase is unchanged, to the letter.

    The phrase itself may be replaced, or be dropped if it was an item of a list.
    """
    start, stop = phrase(before, mention)
    # Without this check, prefix and suffix could overlap in a shorter caption, and both would match.
    new_length = len(after) - start - (len(before) - stop)
    kept = new_length >= 0 and after.startswith(before[:start]) and after.endswith(before[stop:])
    return kept or after in without(before, mention, language)
