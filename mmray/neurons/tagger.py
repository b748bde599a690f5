"""The nouns of English and German captions by HanTa's taggers, with their characters.

HanTa's models come in its wheel: trigram taggers over morphemes, of the British National Corpus and a German treebank
(Wartena 2019, KONVENS). Captions are short, often have no verb, and begin with a bare noun, so rules for English
correct what the tagger makes of that (`A remote.`, `Sink in a bathroom`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"n['’]t\b|(?<=\w)['’]\w+|\w+?(?=n['’]t\b)|\w+(?:-\w+)*|[^\w\s]")
"""Cut as the tagger's treebank is: does n't, the dog 's bowl."""
LONGEST_WORD = 40
"""Letters of a word that the tagger sees, the last ones: its time grows with their square. Nothing longer is a noun."""
LATIN_WORD = re.compile(
    f"(?=.{{2,{LONGEST_WORD}}}$)[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+(?:-[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+)*"
)

ADDED_NOUNS = re.compile(
    # The end of a phrase after a determiner: `A remote.`, `the small remote is`; but not in `the red and yellow
    # balloon` or `a big, red bus`. A word that the tagger does not know may follow a noun: `a red giraffe`.
    r"D[JUVMn]*(?:(?P<only>[JUV])|N+(?P<unknown>U))(?=$|[^NJUVMc,]|,(?![JUVM])|c(?![JUVMN]))"
    # The second of two things: `A chair and remote.`
    r"|D[JUVMn]*N+c(?P<second>J)(?=$|\.)"
    # The caption's first word, unless it tells to do something: `Bear in the woods`, but `Look at the woods`.
    r"|^(?P<first>V)(?=p)"
)
"""A caption's words as letters: Determiner, Noun, adJective, Unknown word, base form of a Verb, number, other Modifier,
conjunction, preposition, comma, full stop, x for anything else."""
TAKEN_VERBS = re.compile(r"N(?P<verb>N)(?=D)")
"""A plural noun between a noun and a determiner is a verb: `A girl brushes her teeth`."""

LETTERS = {
    tag: letter
    for letter, tags in {
        "D": "AT0 DPS",
        "N": "NN NN0 NN1 NN2 NP0",
        "J": "AJ0",
        "U": "UNC !!!",
        "V": "VVB VVI",
        "n": "CRD ORD",
        "M": "AJC AJS AV0 VVN VVG",
        "c": "CJC",
        "p": "PRP PRF",
    }.items()
    for tag in tags.split()
}
"""Tag of the British National Corpus → letter."""
WORDS = {
    **dict.fromkeys(("one", "another"), "D"),
    **dict.fromkeys(("other", "others", "same", "such", "own"), "M"),
    **dict.fromkeys(("to", "at", "up", "for", "like"), "x"),
    **dict.fromkeys(",;:", ","),
    **dict.fromkeys(".!?", "."),
}
"""Words whose letter is not that of their tag."""


@dataclass(frozen=True)
class Noun:
    """A noun `[start, stop)` of a caption, in characters."""

    start: int
    stop: int
    plural: bool


@dataclass(frozen=True)
class Tagger:
    """A model of HanTa's wheel and the tags of its nouns."""

    model: str
    nouns: frozenset[str]
    plurals: frozenset[str] = frozenset()
    letters: Mapping[str, str] = field(default_factory=dict)
    """Letters for the rules, where there are any."""


LANGUAGES = {
    "en": Tagger("morphmodel_en.pgz", frozenset({"NN", "NN0", "NN1", "NN2", "NP0"}), frozenset({"NN2"}), LETTERS),
    "de": Tagger("morphmodel_ger.pgz", frozenset({"NN", "NNA", "NNI", "NE"})),
}
"""By code. Dutch is left out: its model takes 5 seconds and 800 MB to load."""


def hanta_nouns(caption: str, language: str) -> list[Noun]:
    """Return the nouns of a caption in a language of `LANGUAGES`, in order, proper nouns included."""
    known = LANGUAGES[language]
    tokens = list(TOKEN.finditer(caption))
    if not tokens:
        return []
    words = [token.group()[-LONGEST_WORD:].replace("’", "'") for token in tokens]
    tags = _model(known.model).tag_sent(words, taglevel=0)
    nouns = {place for place, tag in enumerate(tags) if tag in known.nouns}
    if known.letters:
        letters = "".join(
            WORDS.get(token.group().lower()) or known.letters.get(tag, "x")
            for token, tag in zip(tokens, tags, strict=True)
        )
        nouns |= {match.start(match.lastgroup or 0) for match in ADDED_NOUNS.finditer(letters)}
        nouns -= {match.start("verb") for match in TAKEN_VERBS.finditer(letters) if tags[match.start("verb")] == "NN2"}
    return [
        Noun(tokens[place].start(), tokens[place].end(), tags[place] in known.plurals)
        for place in sorted(nouns)
        if LATIN_WORD.fullmatch(tokens[place].group())
    ]


@cache
def _model(name: str) -> Any:
    import HanTa
    from HanTa.HanoverTagger import HanoverTagger

    # The whole path: of a bare name HanTa would unpickle a file of the working directory, if there is one.
    return HanoverTagger(str(Path(HanTa.__file__).with_name(name)))
