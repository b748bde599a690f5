"""CHAIR by its rules, in code that shares nothing with the package but the table of words."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mmray.objects import words

TABLE: dict[str, list[str]] = json.loads((Path(words.__file__).parent / "coco_objects.json").read_text())["synonyms"]


ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]

VEHICLES = ["jet", "train"]
IRREGULAR = {
    "man": "men",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "goose": "geese",
    "knife": "knives",
    "calf": "calves",
    "ox": "oxen",
    "sheep": "sheep",
    "scissors": "scissors",
    "skis": "skis",
    "cattle": "cattle",
    "people": "people",
    "aircraft": "aircraft",
}


def plural(word: str) -> str:
    before, blank, last = word.rpartition(" ")
    for one, many in IRREGULAR.items():
        if last == one or (one in ("man", "child", "knife") and last.endswith(one) and last != "human"):
            return before + blank + last.removesuffix(one) + many
    if last.endswith("y") and last[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return word + ("es" if last.endswith(("s", "x", "ch", "sh")) else "s")


WORDS = [word for name, words in TABLE.items() for word in [name, *words]]


ONE_OF = {part: one for word in WORDS for one, part in zip(word.split(), plural(word).split(), strict=True)} | {
    f"{word}s": word for word in ("animal", "cub", "track", "plate")
}


class Reference:
    """CHAIR as its paper and code have it: tokens, singulars, double words, synonyms, sets."""

    def __init__(self, table: dict[str, list[str]], to_singular: Callable[[str], str]) -> None:
        self.to_singular = to_singular
        self.object_of = {word: name for name, words in table.items() for word in [name, *words]}
        self.double = {word: word for word in self.object_of if word.count(" ") == 1}
        self.double |= {word: word for word in ("home plate", "train track")}
        self.double |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
        self.double |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
        self.double |= {"bow tie": "tie", "toilet seat": "toilet"}

    def mentions(self, caption: str) -> list[str]:
        tokens = [self.to_singular(token) for token in re.findall(r"[a-z]+(?:-[a-z]+)*", caption.lower())]
        words = []
        while tokens:
            pair = " ".join(tokens[:2])
            words.append(self.double.get(pair, tokens[0]))
            del tokens[: 2 if pair in self.double else 1]
        if "toilet" in words:
            words = [word for word in words if word != "seat"]
        return [self.object_of[word] for word in words if word in self.object_of]

    def chair(self, captions: Sequence[str], truths: Sequence[set[str]]) -> tuple[float, float]:
        """Return CHAIR_s and CHAIR_i."""
        wrong, mentions, bad = 0, 0, 0
        for caption, truth in zip(captions, truths, strict=True):
            found = self.mentions(caption)
            absent = [name for name in found if name not in truth]
            wrong, mentions, bad = wrong + len(absent), mentions + len(found), bad + bool(absent)
        return bad / len(captions), wrong / mentions


def reference() -> Reference:
    return Reference(TABLE, lambda word: ONE_OF.get(word, word))
