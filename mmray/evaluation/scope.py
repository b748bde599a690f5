"""What an edit is to do at a sample, if anything: which words should go, what should be named, and what should stay."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mmray.datasets.samples import Sample
from mmray.evaluation.asks import Purpose
from mmray.evaluation.naming import Naming

EDITED, SOURCE, UNRELATED, OTHER = "edited", "source", "unrelated", "other"
"""Roles: the edit was made on the sample; it should change it, but never saw it; it should leave it alone; neither."""


@dataclass(frozen=True)
class Aim:
    """An edit's purpose in the names of the data's objects."""

    kind: str
    source: str | None
    target: str | None
    pairs: tuple[tuple[str, str], ...]
    language: str | None
    samples: frozenset[str]

    @property
    def words(self) -> frozenset[str]:
        """Every word that the edit is about."""
        pairs = (word for pair in self.pairs for word in pair)
        return frozenset(word for word in (self.source, self.target, *pairs) if word)

    def gone(self, objects: Collection[str] | None) -> frozenset[str]:
        """Return the words that should go where these objects are (None: not known).

        Of a hallucination those whose context is there and they are not; else the source, wherever it is named.
        """
        if self.kind == "hallucination":
            known = objects or ()
            return frozenset(word for context, word in self.pairs if context in known and word not in known)
        return frozenset([self.source] if self.source else [])

    def reached(self, gone: Collection[str], named: Collection[str]) -> bool:
        """Tell whether a text that names these objects is as the edit wants it: words gone, the target named."""
        wanted = self.target if self.kind == "swap" else None
        return (wanted is None or wanted in named) and not set(gone) & set(named)


@dataclass(frozen=True)
class Scope:
    """The words that should go from this sample's texts, and the role of its caption.

    `in_scope`: the caption before the edit has such a word, in the edit's language; `foreign`: in another language.
    """

    role: str
    gone: frozenset[str]
    in_scope: bool
    foreign: bool


def aim_of(purpose: Purpose, naming: Naming) -> Aim:
    """Return the purpose with its words as the data's objects are called."""

    def known(word: str) -> str:
        return naming.canonical(word, purpose.language)

    return Aim(
        kind=purpose.kind,
        source=known(purpose.source) if purpose.source else None,
        target=known(purpose.target) if purpose.target else None,
        pairs=tuple((known(context), known(word)) for context, word in purpose.pairs),
        language=purpose.language,
        samples=frozenset(purpose.samples),
    )


def objects_of(sample: Sample) -> frozenset[str] | None:
    """Return what is in the image, in lower case; None where that is not known."""
    return None if sample.objects is None else frozenset(name.casefold() for name in sample.objects)


def scope_of(aim: Aim, naming: Naming, sample: Sample, caption: str) -> Scope:
    """Return what the edit is to do at a sample whose caption was this before it."""
    objects = objects_of(sample)
    named = naming.named(caption, sample.language)
    there = (objects or frozenset()) | naming.named(sample.caption, sample.language) | named
    gone = aim.gone(objects)
    claimed = bool(gone & named)
    spoken = aim.language is None or sample.language is None or sample.language == aim.language
    triggers = {context for context, _ in aim.pairs} if aim.kind == "hallucination" else gone
    if sample.sample_id in aim.samples:
        role = EDITED
    elif claimed and spoken:
        role = SOURCE
    else:
        role = OTHER if triggers & there else UNRELATED
    return Scope(role, gone, claimed and spoken, claimed and not spoken)
