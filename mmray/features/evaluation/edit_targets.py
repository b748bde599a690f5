"""What an edit is to do at a sample, if anything: which words should go, what should be named, and what should stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmray.data.samples import Sample
from mmray.features.evaluation.queries import EditPurpose
from mmray.objects.lexicon import ObjectLexicon, objects_of

EDITED, SOURCE, UNRELATED, OTHER = "edited", "source", "unrelated", "other"
"""Roles: the edit was made on the image; it should change it, but never saw it; it should leave it alone; neither."""


@dataclass(frozen=True)
class EditTarget:
    """One purpose of an edit, in the names of the data's objects."""

    kind: str
    source: str | None
    target: str | None
    pairs: tuple[tuple[str, str], ...]
    language: str | None
    samples: frozenset[str]
    images: frozenset[str]

    @property
    def name(self) -> str:
        """What it is about, in short."""
        return f"{self.source}→{self.target}" if self.kind == "swap" else self.source or self.kind

    @property
    def words(self) -> frozenset[str]:
        """Every word that it is about."""
        pairs = (word for pair in self.pairs for word in pair)
        return frozenset(word for word in (self.source, self.target, *pairs) if word)

    @property
    def triggers(self) -> frozenset[str]:
        """The objects where there may be something to do: a hallucination's contexts, else the source."""
        if self.kind == "hallucination":
            return frozenset(context for context, _ in self.pairs)
        return frozenset([self.source] if self.source else [])

    def gone(self, objects: Collection[str] | None) -> frozenset[str]:
        """Return the words that should go where these objects are (None: not known).

        Of a hallucination those whose context is there and they are not; else the source, wherever it is named.
        """
        if self.kind == "hallucination":
            known = objects or ()
            return frozenset(word for context, word in self.pairs if context in known and word not in known)
        return self.triggers

    def learnt_on(self, sample: Sample) -> bool:
        """Return whether the edit was made on the sample's image.

        Other data may know the image by another id, and another image by that one: where the edit has digests, they say
        it. Ids decide for an edit without them, and for a sample without an image.
        """
        if self.images and sample.image is not None:
            return sample.image_key in self.images
        return sample.sample_id in self.samples

    def spoken(self, language: str | None) -> bool:
        """Return whether the edit was made for texts of this language."""
        return self.language is None or language is None or language == self.language


@dataclass(frozen=True)
class EditTargets:
    """All wishes of an edit: one, or of several edits in one those of each."""

    wishes: tuple[EditTarget, ...]

    @property
    def words(self) -> frozenset[str]:
        """Every word that the edit is about."""
        return frozenset[str]().union(*(wish.words for wish in self.wishes))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every pair of a context and a hallucinated word."""
        return tuple(dict.fromkeys(pair for wish in self.wishes for pair in wish.pairs))

    def gone(self, objects: Collection[str] | None) -> frozenset[str]:
        """Return the words that should go where these objects are."""
        return frozenset[str]().union(*(wish.gone(objects) for wish in self.wishes))

    def called(self, objects: Collection[str] | None, named: Collection[str]) -> tuple[EditTarget, ...]:
        """Return the wishes that have something to do in a text that names these things, where these objects are."""
        return tuple(wish for wish in self.wishes if wish.gone(objects) & set(named))


def reached(wishes: Sequence[EditTarget], objects: Collection[str] | None, before: set[str], after: set[str]) -> bool:
    """Return whether a text is as these wishes want it, from what it names before and after: words gone, targets named.

    What one wish takes away another may put there.
    """
    targets = {wish.target for wish in wishes if wish.kind == "swap" and wish.target}
    gone = set().union(*(wish.gone(objects) & before for wish in wishes))
    return targets <= after and not (gone - targets) & after


@dataclass(frozen=True)
class TargetsOfSample:
    """The role of a sample's caption, and the wishes that have something to do there.

    `wishes` are those in whose language the caption is; `foreign` the others. `gone` are all words that should go from
    texts about this image, whether or not the caption has them.
    """

    role: str
    objects: frozenset[str] | None
    gone: frozenset[str]
    wishes: tuple[EditTarget, ...]
    foreign: tuple[EditTarget, ...]


def aim_of(purposes: Sequence[EditPurpose], naming: ObjectLexicon) -> EditTargets:
    """Return the purposes with their words as the data's objects are called."""
    return EditTargets(tuple(_wish(purpose, naming) for purpose in purposes))


def _wish(purpose: EditPurpose, naming: ObjectLexicon) -> EditTarget:
    def known(word: str) -> str:
        return naming.canonical(word, purpose.language)

    return EditTarget(
        kind=purpose.kind,
        source=known(purpose.source) if purpose.source else None,
        target=known(purpose.target) if purpose.target else None,
        pairs=tuple((known(context), known(word)) for context, word in purpose.pairs),
        language=purpose.language,
        samples=frozenset(purpose.samples),
        images=frozenset(purpose.images),
    )


def scope_of(aim: EditTargets, naming: ObjectLexicon, sample: Sample, caption: str) -> TargetsOfSample:
    """Return what the edit is to do at a sample whose caption was this before it."""
    objects = objects_of(sample)
    named = naming.named(caption, sample.language)
    called = aim.called(objects, named)
    wishes = tuple(wish for wish in called if wish.spoken(sample.language))
    if any(wish.learnt_on(sample) for wish in aim.wishes):
        role = EDITED
    elif wishes:
        role = SOURCE
    else:
        there = (objects or frozenset()) | naming.named(sample.caption, sample.language) | named
        role = OTHER if any(wish.triggers & there for wish in aim.wishes) else UNRELATED
    return TargetsOfSample(
        role, objects, aim.gone(objects), wishes, tuple(wish for wish in called if wish not in wishes)
    )
