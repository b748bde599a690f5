"""Answers read from replies, or none where they can't be read."""

from __future__ import annotations

import re

from mmray.errors import InputError

YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
AMOUNT = r"\d+(?:\.\d+)?"
NUMBER = re.compile(rf"(?<!\w)-?{AMOUNT}")
SCALES = tuple(
    re.compile(scale, re.IGNORECASE)
    for scale in (
        rf"(?:/|\bout of)\s*{AMOUNT}",
        rf"{AMOUNT}\s*(?:[-–—]|\bto\b|\band\b)\s*{AMOUNT}",
        rf"\bof\s*{AMOUNT}",
    )
)
"""What names a scale beside an answer, in the order in which it is left out: 7/10, from 1 to 10, 7 of 10."""


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
    """Return the answer in a reply: its number; or 1 for yes and for the first of two words, else 0.

    Of several words the first is the answer; of different numbers none is, apart from those that name a scale. None
    where there is no answer: a reply that can't be read is none.
    """
    pattern = reader(parse)
    if parse == "number":
        for scale in SCALES:
            reply = scale.sub(" ", reply)
        values = {float(number) for number in pattern.findall(reply)}
        return values.pop() if len(values) == 1 else None
    found = pattern.search(reply)
    if found is None:
        return None
    first = "yes" if parse == "yes_no" else parse.split("|")[0].strip()
    return float(found[0].casefold() == first.casefold())
