"""Find the nouns of a caption, with their characters, from the data's objects, a tagger, or a lexicon.

A concept is a noun in the caption's language, in lower case and in the form that its source lists (`dogs` is an
occurrence of `dog`); `perro` and `dog` are two concepts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from mmray.errors import InputError
from mmray.neurons.inflection import singular, singulars
from mmray.neurons.language_id import ARTICLES, LANGUAGE_NAMES, language_code
from mmray.neurons.tagger import LANGUAGES, Noun, hanta_nouns

TAGGERS = {"hanta": tuple(LANGUAGES), "textblob": ("en",)}
"""Taggers, named after their packages → the languages that each knows."""
REVISION = 1
"""Version of this package's tagging rules. Raise it when they change: runs then don't mix nouns of both."""
NAMED = ("objects", *TAGGERS, "auto")

WORD = re.compile(r"\w+(?:-\w+)*")
PIECE = re.compile(r"(?<=\w['’])\w")
"""What follows an apostrophe, such as the t of can't."""
UNSPACED = re.compile("[぀-ヿ㐀-鿿가-힯฀-๿]")
"""Scripts that don't separate words by spaces (kana, Han, Hangul, Thai): their nouns are found as substrings."""


@dataclass(frozen=True)
class Mention:
    """Characters `[start, stop)` of a caption that name a concept."""

    concept: str
    start: int
    stop: int


@dataclass(frozen=True)
class NounSource:
    """Where concepts come from; built once by the driver and sent to every worker."""

    kind: str
    """objects, lexicon, or one of `TAGGERS`."""
    vocabulary: tuple[str, ...] = ()
    """All object names of the data. Generated captions are searched for all, because they may name absent objects."""
    translations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Object → language → name."""
    lexicon: Mapping[str | None, frozenset[str]] = field(default_factory=dict)
    """Nouns of a lexicon file by language; None: any language."""

    def find(
        self, caption: str, language: str | None, objects: tuple[str, ...] | None, *, generated: bool = False
    ) -> list[Mention]:
        """Return every mention of every noun in the caption, in order."""
        if self.kind in TAGGERS:
            return tagged_nouns(caption, language, self.kind)
        if self.kind == "objects":
            names = self.vocabulary if generated else objects or ()
            return find_forms(caption, object_forms(names, language, self.translations), language)
        forms = self.lexicon.get(None, frozenset()) | self.lexicon.get(language, frozenset())
        return find_forms(caption, forms, language)

    def knows(self, language: str) -> bool:
        """Return whether nouns of this language can be found; only taggers are limited to some languages."""
        return language in TAGGERS.get(self.kind, (language,))

    def digest(self, *, generated: bool) -> str:
        """Return a digest of all that decides which nouns are found, in the data's or in `generated` captions."""
        lexicon = sorted((language or "", sorted(nouns)) for language, nouns in self.lexicon.items())
        translations = sorted((name, sorted(names.items())) for name, names in self.translations.items())
        content = repr((self.kind, self.vocabulary if generated else (), translations, lexicon))
        if self.kind in TAGGERS:
            content += repr([REVISION, *((name, version(name)) for name in (self.kind, "py3langid", "simplemma"))])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def noun_source(nouns: str, vocabulary: Iterable[str], translations: Mapping[str, Mapping[str, str]]) -> NounSource:
    """Return the source that `--nouns` names; `auto` takes objects if the data has a vocabulary, else HanTa.

    Raises InputError for a missing lexicon file, or for `objects` of data that has none.
    """
    names = tuple(vocabulary)
    if nouns == "auto":
        nouns = "objects" if names else "hanta"
    if nouns in TAGGERS:
        return NounSource(nouns)
    if nouns == "objects":
        if not names:
            raise InputError("--nouns objects: the data has no objects column; name it with --objects-column")
        return NounSource("objects", names, translations)
    return NounSource("lexicon", lexicon=read_lexicon(Path(nouns)))


def read_lexicon(path: Path) -> dict[str | None, frozenset[str]]:
    """Return the nouns of a lexicon by language (None: any); a line is a noun, optionally a tab and its language."""
    if not path.is_file():
        raise InputError(f"--nouns {path}: no such file; give {', '.join(NAMED)} or a file with one noun per line")
    forms: dict[str | None, set[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        noun, tab, language = line.partition("\t")
        if not noun.strip() or noun.startswith("#"):
            continue
        *words, last = noun.split()
        # A tab that an editor turned into spaces would silently change the noun.
        if words and not tab and last in LANGUAGE_NAMES:
            raise InputError(
                f"--nouns {path}, line {number}: {noun.strip()!r} ends in the language {last!r} after a blank; write a "
                "tab before it, or after it if it is part of the noun"
            )
        forms.setdefault(language.strip() or None, set()).add(noun.strip().casefold())
    if not forms:
        raise InputError(f"--nouns {path}: no noun in it; write one per line")
    return {language: frozenset(found) for language, found in forms.items()}


def find_forms(caption: str, forms: frozenset[str], language: str | None) -> list[Mention]:
    """Return the mentions of these nouns, in order; the last word may be in the plural, and longer nouns win."""
    words = list(WORD.finditer(caption))
    longest, unspaced = _shape(forms)
    found: list[Mention] = []
    taken = [False] * len(caption)
    # Longest first: `traffic light` is not a `light`.
    for count in range(longest, 0, -1):
        for first, last in zip(words, words[count - 1 :], strict=False):
            start, stop = first.start(), last.end()
            concept = _listed(caption, start, last.start(), stop, forms, language)
            if concept is not None and not any(taken[start:stop]):
                found.append(Mention(concept, start, stop))
                taken[start:stop] = [True] * (stop - start)
    for form in unspaced:
        # Not in the casefolded caption: it may be longer (ß becomes ss), which shifts characters.
        for match in re.finditer(re.escape(form), caption, re.IGNORECASE):
            if not any(taken[match.start() : match.end()]):
                found.append(Mention(form, match.start(), match.end()))
                taken[match.start() : match.end()] = [True] * len(form)
    return sorted(found, key=lambda mention: mention.start)


def tagged_nouns(caption: str, language: str | None, tagger: str = "hanta") -> list[Mention]:
    """Return the nouns that one of `TAGGERS` finds, in the singular; none in a language that it does not know.

    Without `language`, it is guessed from the caption.
    """
    # `en-GB`, `eng` and `English` are one language.
    code = language_code(caption, language)
    if code not in TAGGERS[tagger]:
        return []
    nouns = textblob_nouns(caption) if tagger == "textblob" else hanta_nouns(caption, code)
    return [
        Mention(_singular(caption[noun.start : noun.stop], code, plural=noun.plural), noun.start, noun.stop)
        for noun in nouns
        if caption[noun.start : noun.stop].lower() not in ARTICLES
    ]


def textblob_nouns(caption: str) -> list[Noun]:
    """Return the nouns that TextBlob's pattern tagger finds in an English caption."""
    from textblob.en import tag

    nouns, end = [], 0
    for word, kind in tag(caption, tokenize=True):
        start = caption.find(word, end)
        if start < 0:
            continue
        end = start + len(word)
        # The tagger cuts can't and they'll into pieces, and calls some of them nouns.
        piece = len(word) == 1 or PIECE.match(caption, start)
        if kind.startswith("NN") and WORD.fullmatch(word) and not piece:
            nouns.append(Noun(start, end, plural=kind.endswith("S")))
    return nouns


def _singular(word: str, language: str, *, plural: bool) -> str:
    """Return a noun in lower case and in the singular."""
    # An English singular is kept: a dictionary would turn a saw into the verb see.
    inflected = language != "en" or plural or (word.lower().endswith("s") and not word.lower().endswith("ss"))
    return singular(word, language) if inflected else word.casefold()


@lru_cache(maxsize=1024)
def _shape(forms: frozenset[str]) -> tuple[int, tuple[str, ...]]:
    """Return the most words of a form, and the forms to find as substrings, longest first."""
    unspaced = sorted((form for form in forms if UNSPACED.search(form)), key=len, reverse=True)
    return max((len(WORD.findall(form)) for form in forms), default=0), tuple(unspaced)


def _listed(caption: str, start: int, last: int, stop: int, forms: frozenset[str], language: str | None) -> str | None:
    text = caption[start:stop].casefold()
    if text in forms:
        return text
    before = caption[start:last].casefold()
    found = (before + singular for singular in singulars(caption[last:stop], language))
    return next((form for form in found if form in forms), None)


def object_forms(
    objects: Iterable[str], language: str | None, translations: Mapping[str, Mapping[str, str]]
) -> frozenset[str]:
    """Return the objects' names in a language, in lower case; names without a translation stay as they are."""
    forms = set()
    for name in objects:
        names = translations.get(name, {})
        forms.add((names.get(language) or name if language else name).casefold())
    return frozenset(forms)
