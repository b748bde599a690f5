"""Answers read from replies, or none where they can't be read."""

from __future__ import annotations

import re
from typing import Literal

from mmray.errors import InputError

Parser = Literal["sentences", "released"]
"""How a yes or no is read from an answer: sentence by sentence, or as POPE's released code does."""

SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
UNSURE = re.compile(
    r"(?:\bnot|\bcannot|n[’']t) (?:\w+ )?(?:sure|clear|certain|know|tell|say|determine)\b"
    r"|\b(?:unsure|unclear|(?:hard|difficult|impossible) to (?:tell|say|determine))\b",
    re.IGNORECASE,
)
DENIED = re.compile(r"\b(?:not|cannot|none|neither|nor|without|lacks?|absent)\b|n[’']t\b", re.IGNORECASE)
AFFIRMED = re.compile(
    r"\b(?:there(?:[’']s| is| are)|(?:can|do|does) (?:\w+ )?see|(?:i|we) see|can be seen|it (?:is|does)"
    r"|(?:image|picture|photo|scene) (?:does|has|contains?|shows?|includes?|features?|depicts?)"
    r"|(?:is|are) (?:\w+ )?(?:visible|present|seen|shown|in the (?:image|picture|photo|scene)))\b",
    re.IGNORECASE,
)
"""What a sentence without yes or no says: that it can't be told, that a thing is not there, and that it is."""
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
"""What names a scale next to an answer, in the order in which it is left out: 7/10, from 1 to 10, 7 of 10."""


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
    if parse == "yes_no":
        said = says_yes(reply)
        return None if said is None else float(said)
    pattern = reader(parse)
    if parse == "number":
        for scale in SCALES:
            reply = scale.sub(" ", reply)
        values = {float(number) for number in pattern.findall(reply)}
        return values.pop() if len(values) == 1 else None
    found = pattern.search(reply)
    if found is None:
        return None
    return float(found[0].casefold() == parse.split("|")[0].strip().casefold())


def says_yes(answer: str, parser: Parser = "sentences") -> bool | None:
    """Return whether an answer is yes; None where it is neither yes nor no.

    sentences: of the first sentence that says either, its first yes or no; in one with neither, whether it denies
    ("There is not a dog") or affirms. Questions, and that it can't be told, are neither.
    released: as POPE's code reads it, an answer is no if its first sentence has the word No, no or not as it is spelt
    here, and else yes.
    """
    if parser == "released":
        words = answer.partition(".")[0].replace(",", "").split(" ")
        return not {"No", "no", "not"}.intersection(words)
    for sentence in SENTENCE.findall(answer):
        if found := YES_OR_NO.search(sentence):
            return found[1].lower() == "yes"
        if sentence.endswith("?") or UNSURE.search(sentence):
            continue
        if DENIED.search(sentence):
            return False
        if AFFIRMED.search(sentence):
            return True
    return None
