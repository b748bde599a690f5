"""Nouns of English and German captions by HanTa's taggers, with their characters.

HanTa's wheel includes its models: trigram taggers over morphemes, trained on the British National Corpus and a German
treebank (Wartena 2019, KONVENS). Captions are short, often without a verb, and may begin with a bare noun. Rules for
English correct typical errors there (`A remote.`, `Sink in a bathroom`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"n['’]t\b|(?<=\w)['’]\w+|\w+?(?=n['’]t\b)|\w+(?:-\w+)*|[^\w\s]")
"""Tokens as in the tagger's treebank: does n't, the dog 's bowl."""
LONGEST_WORD = 40
"""The tagger gets only a word's last letters, because its time grows quadratically. Longer words are no nouns."""
LATIN_WORD = re.compile(
    f"(?=.{{2,{LONGEST_WORD}}}$)[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+(?:-[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+)*"
)

ADDED_NOUNS = re.compile(
    # The last word of a phrase after a determiner: `A remote.`, `the small remote is`; but not in `the red and yellow
    # balloon` or `a big, red bus`. An unknown word may follow a noun: `a red giraffe`.
    r"D[JUVMn]*(?:(?P<only>[JUV])|N+(?P<unknown>U))(?=$|[^NJUVMc,]|,(?![JUVM])|c(?![JUVMN]))"
    # The second of two things: `A chair and remote.`
    r"|D[JUVMn]*N+c(?P<second>J)(?=$|\.)"
    # The caption's first word, unless it is an imperative: `Bear in the woods`, but `Look at the woods`.
    r"|^(?P<first>V)(?=p)"
)
"""Matches a caption's tags as letters: Determiner, Noun, adJective, Unknown word, Verb in its base form, number,
other Modifier, conjunction, preposition, comma, full stop; x is anything else."""
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
"""Words whose letter differs from that of their tag."""


@dataclass(frozen=True)
class Noun:
    """A noun `[start, stop)` of a caption, in characters."""

    start: int
    stop: int
    plural: bool


@dataclass(frozen=True)
class Tagger:
    """A model in HanTa's wheel, the tags of its nouns, and the letters of all tags if there are rules."""

    model: str
    nouns: frozenset[str]
    plurals: frozenset[str] = frozenset()
    letters: Mapping[str, str] = field(default_factory=dict)


LANGUAGES = {
    "en": Tagger("morphmodel_en.pgz", frozenset({"NN", "NN0", "NN1", "NN2", "NP0"}), frozenset({"NN2"}), LETTERS),
    "de": Tagger("morphmodel_ger.pgz", frozenset({"NN", "NNA", "NNI", "NE"})),
}
"""By language code. No Dutch: its model takes 5 seconds and 800 MB to load."""


def hanta_nouns(caption: str, language: str) -> list[Noun]:
    """Return the nouns of a caption in a language of `LANGUAGES`, in order, proper nouns included."""
    known = LANGUAGES[language]
    tokens = list(TOKEN.finditer(caption))
    if not tokens:
        return []
    words = [token.group()[-LONGEST_WORD:].replace("’", "'") for token in tokens]
    tags = _model(known.model).tag_sent(words, taglevel=0)
    nouns = {index for index, tag in enumerate(tags) if tag in known.nouns}
    if known.letters:
        # One letter per token, so that rules are regular expressions over tags.
        letters = "".join(
            WORDS.get(token.group().lower()) or known.letters.get(tag, "x")
            for token, tag in zip(tokens, tags, strict=True)
        )
        nouns |= {match.start(match.lastgroup or 0) for match in ADDED_NOUNS.finditer(letters)}
        nouns -= {match.start("verb") for match in TAKEN_VERBS.finditer(letters) if tags[match.start("verb")] == "NN2"}
    return [
        Noun(tokens[index].start(), tokens[index].end(), tags[index] in known.plurals)
        for index in sorted(nouns)
        if LATIN_WORD.fullmatch(tokens[index].group())
    ]


@cache
def _model(name: str) -> Any:
    import HanTa
    from HanTa.HanoverTagger import HanoverTagger

    # The full path: given a bare name, HanTa would unpickle a file of that name in the working directory.
    return HanoverTagger(str(Path(HanTa.__file__).with_name(name)))
