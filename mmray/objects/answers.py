"""Read answers from replies: yes or no, a number, or one of two words."""

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
"""Phrases of sentences without yes or no: unsure, denying, affirming."""
AMOUNT = r"\d+(?:\.\d+)?"
NUMBER = re.compile(rf"(?<!\w)-?{AMOUNT}")
# Ranges before the bare "of", which would take "of 1" out of "of 1 to 10" and leave a second number.
SCALES = tuple(
    re.compile(scale, re.IGNORECASE)
    for scale in (
        rf"(?:/|\bout of)\s*{AMOUNT}",
        rf"{AMOUNT}\s*(?:[-–—]|\bto\b|\band\b)\s*{AMOUNT}",
        rf"\bof\s*{AMOUNT}",
    )
)
"""Numbers that name a scale next to the answer (7/10, from 1 to 10, 7 of 10), in the order they are removed."""


def reader(parse: str) -> re.Pattern[str]:
    """Return the pattern of an answer for `yes_no`, `number`, or two words such as `man|woman`.

    Raises InputError for anything else.
    """
    if parse in ("yes_no", "number"):
        return YES_OR_NO if parse == "yes_no" else NUMBER
    words = [word.strip() for word in parse.split("|")]
    if len(words) != 2 or not all(words):
        raise InputError(f"parse {parse!r}: give yes_no, number, or two words such as man|woman")
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def value_of(reply: str, parse: str) -> float | None:
    """Return the answer in a reply: a number; or 1 for yes or the first of two words, else 0. None: unreadable.

    The first of several words counts. Of several different numbers none does, apart from those that name a scale.
    """
    if parse == "yes_no":
        answer = says_yes(reply)
        return None if answer is None else float(answer)
    pattern = reader(parse)
    if parse == "number":
        # "7 of 10" has two numbers and one answer.
        for scale in SCALES:
            reply = scale.sub(" ", reply)
        values = {float(number) for number in pattern.findall(reply)}
        return values.pop() if len(values) == 1 else None
    found = pattern.search(reply)
    if found is None:
        return None
    return float(found[0].casefold() == parse.split("|")[0].strip().casefold())


def says_yes(answer: str, parser: Parser = "sentences") -> bool | None:
    """Return whether an answer is yes; None: neither yes nor no.

    sentences: the first yes or no of the first sentence with either. A sentence with neither counts if it denies
    ("There is not a dog") or affirms; questions and "I am not sure" don't.
    released: as in POPE's code, no if the first sentence has the word No, no or not, else yes.
    """
    if parser == "released":
        words = answer.partition(".")[0].replace(",", "").split(" ")
        return not {"No", "no", "not"}.intersection(words)
    for sentence in SENTENCE.findall(answer):
        if found := YES_OR_NO.search(sentence):
            return found[1].lower() == "yes"
        # "Is there a dog?" repeats the question, and would affirm.
        if sentence.endswith("?") or UNSURE.search(sentence):
            continue
        # Denial first: "There is not a dog" affirms too.
        if DENIED.search(sentence):
            return False
        if AFFIRMED.search(sentence):
            return True
    return None
