"""Answers read from replies, or none where they can't be read."""

from __future__ import annotations

import re

from mmray.errors import InputError

YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reader(parse: str) -> re.Pattern[str]:
    """Return what finds an answer in a reply: `yes_no`, `number`, or words between bars such as `man|woman`.

    Raises InputError for anything else.
    """
    if parse in ("yes_no", "number"):
        return YES_OR_NO if parse == "yes_no" else NUMBER
    words = [word.strip() for word in parse.split("|")]
    if len(words) != 2 or not all(words):
        raise InputError(f"parse {parse!r}: give yes_no, number, or two words such as man|woman")
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def value_of(reply: str, parse: str) -> float | None:
    """Return the first answer in a reply: a number; or 1 for yes and for the first of two words, else 0.

    None where there is none: a reply that can't be read is no answer.
    """
    found = reader(parse).search(reply)
    if found is None:
        return None
    if parse == "number":
        return float(found[0])
    first = "yes" if parse == "yes_no" else parse.split("|")[0].strip()
    return float(found[0].casefold() == first.casefold())
