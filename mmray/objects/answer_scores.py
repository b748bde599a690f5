"""How benchmarks of visual question answering score a reply, given what people answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from mmray.errors import InputError

Judge = Callable[[str, str, Sequence[str]], float]
"""(question, reply, people's answers) → score from 0 to 1."""

BEGINS = "begins"
"""Score that takes no generated reply."""
LEAST_ANSWERS = 4
"""Answers that VQA accuracy needs: a reply is right where three others gave it, too."""
ANLS_THRESHOLD = 0.5
"""Normalised distance from which on a reply counts as wrong in ANLS."""
REMOVED = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
# The stop of a sentence, not the point of a number.
FULL_STOP = re.compile(r"\.(?!\d)")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = frozenset({"a", "an", "the"})
FULL_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    full[:at] + full[at + 1 :]: full for full in FULL_FORMS.split() for at, letter in enumerate(full) if letter == "'"
}
"""A contraction with one apostrophe missing → the contraction."""
# Neither a letter of a word, nor the I of "I'm".
LETTER = re.compile(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9'’])")


@dataclass(frozen=True)
class AnswerScore:
    """A way to score replies."""

    definition: str
    judge: Judge | None = None
    """None: no reply is written, because a teacher-forced pass tells."""


def exact_match(_: str, reply: str, answers: Sequence[str]) -> float:
    """Return whether the reply is one of the answers, whatever the case, outer blanks and a final full stop."""
    return float(_plain(reply) in set(map(_plain, answers)))


def option_letter(_: str, reply: str, answers: Sequence[str]) -> float:
    """Return whether the reply's first capital letter that stands alone is an answer's ("B" or "B: lung")."""
    found = LETTER.search(reply)
    letters = {match[1] for answer in answers if (match := LETTER.search(answer))}
    return float(found is not None and found[1] in letters)


def vqa_accuracy(_: str, reply: str, answers: Sequence[str]) -> float:
    """Return the accuracy of Antol et al. 2015, *VQA*: min(1, others who gave the reply / 3), mean over the people.

    "Others" leaves out one person at a time, as in the released evaluation. Reply and answers are normalised first.
    Raises ValueError for fewer than four answers, of which no reply could be right.
    """
    if len(answers) < LEAST_ANSWERS:
        raise ValueError(f"VQA accuracy needs the answers of several people, {LEAST_ANSWERS} at least; use exact")
    said = normalised(reply)
    # `own` below takes a person's own vote away, so that it can't confirm itself.
    same = [normalised(answer) == said for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def anls(_: str, reply: str, answers: Sequence[str]) -> float:
    """Return the similarity of Biten et al. 2019, *Scene Text VQA*: 1 − NL to the nearest answer, 0 for NL ≥ 0.5.

    NL is the Levenshtein distance over the length of the longer text, whatever the case and the outer blanks.
    """
    return max(_similarity(reply.strip().lower(), answer.strip().lower()) for answer in answers)


SCORES: dict[str, AnswerScore] = {
    BEGINS: AnswerScore("the greedy reply begins with the answer, teacher-forced"),
    "exact": AnswerScore("the reply is an answer, whatever the case and a final full stop", exact_match),
    "letter": AnswerScore("the reply's first capital letter that stands alone is the answer's", option_letter),
    "vqa": AnswerScore("VQA accuracy: min(1, others who gave the reply / 3), normalised as released", vqa_accuracy),
    "anls": AnswerScore("ANLS: Levenshtein similarity to the nearest answer, 0 below one half", anls),
}
"""By name."""


def answer_score(name: str) -> AnswerScore:
    """Return the score of a name, or of MODULE:FUNCTION, a judge of one's own; raises InputError for another."""
    if name in SCORES:
        return SCORES[name]
    module, _, function = name.partition(":")
    choices = f"choose from {', '.join(SCORES)}, or write MODULE:FUNCTION for a judge of your own"
    if not module or not function:
        raise InputError(f"unknown score {name!r}; {choices}")
    try:
        # By name, so that a YAML file can hold it, and each worker imports its own.
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"judge {name}: {error}; put its folder on PYTHONPATH, for workers too") from error
    if not callable(found):
        raise InputError(f"judge {name}: {type(found).__name__} is not a function of question, reply and answers")
    return AnswerScore(f"judged by {name}", found)


def score_reply(score: AnswerScore, question: str, reply: str, answers: Sequence[str]) -> float:
    """Return a reply's score; raises ValueError where a judge returns anything but a number from 0 to 1."""
    assert score.judge is not None
    value = float(score.judge(question, reply, answers))
    if not 0 <= value <= 1:
        raise ValueError(f"{score.definition}: {value} is not from 0 to 1")
    return value


def normalised(text: str) -> str:
    """Return an answer as VQA's evaluation compares it.

    Lower case, digits for number words, no articles, no punctuation but apostrophes, colons and decimal points, and
    apostrophes put back into contractions.
    """
    text = " ".join(text.split())
    found = text
    for mark in REMOVED:
        # A mark between two words parts them, unless the text has it next to a blank, too.
        joined = f"{mark} " in text or f" {mark}" in text or DIGIT_COMMA.search(text)
        found = found.replace(mark, "" if joined else " ")
    words = (NUMBERS.get(word, word) for word in FULL_STOP.sub("", found).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def _similarity(one: str, other: str) -> float:
    """Return 1 − the normalised Levenshtein distance, or 0 where that is ANLS_THRESHOLD or more."""
    longest = max(len(one), len(other))
    distance = _levenshtein(one, other) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _levenshtein(one: str, other: str) -> int:
    above = list(range(len(other) + 1))
    # Of the table of distances, only the row above is needed.
    for row, letter in enumerate(one, 1):
        own = [row]
        for column, another in enumerate(other, 1):
            own.append(min(above[column] + 1, own[-1] + 1, above[column - 1] + (letter != another)))
        above = own
    return above[-1]
