"""What an edit should do at a sample, if anything: which words to remove, what to name, and what to leave alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmray.data.samples import Sample
from mmray.features.editing.edit import Purpose
from mmray.objects.lexicon import ObjectLexicon, objects_of

EDITED, SOURCE, UNRELATED, OTHER = "edited", "source", "unrelated", "other"
"""Roles: the edit was made on the image; it should change it but never saw it; it should leave it alone; neither."""


@dataclass(frozen=True)
class EditRequest:
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
        """The purpose in a few words."""
        return f"{self.source}→{self.target}" if self.kind == "swap" else self.source or self.kind

    @property
    def words(self) -> frozenset[str]:
        """Every word that the purpose names."""
        pairs = (word for pair in self.pairs for word in pair)
        return frozenset(word for word in (self.source, self.target, *pairs) if word)

    @property
    def triggers(self) -> frozenset[str]:
        """The objects at which the edit may act: a hallucination's contexts, else the source."""
        if self.kind == "hallucination":
            return frozenset(context for context, _ in self.pairs)
        return frozenset([self.source] if self.source else [])

    def unwanted(self, objects: Collection[str] | None) -> frozenset[str]:
        """Return the words to remove from texts about an image with these objects (None: unknown).

        Of a hallucination: words that are absent while their context is present. Else the source, wherever it is named.
        """
        if self.kind == "hallucination":
            known = objects or ()
            return frozenset(word for context, word in self.pairs if context in known and word not in known)
        return self.triggers

    def made_on(self, sample: Sample) -> bool:
        """Return whether the edit was made on the sample's image."""
        # Other data may have the same ids for other images, so an image's digest decides if the edit has digests.
        if self.images and sample.image is not None:
            return sample.image_key in self.images
        return sample.sample_id in self.samples

    def covers(self, language: str | None) -> bool:
        """Return whether the edit was made for texts in this language."""
        return self.language is None or language is None or language == self.language


@dataclass(frozen=True)
class EditRequests:
    """All purposes of an edit; a sum of edits has several."""

    requests: tuple[EditRequest, ...]

    @property
    def words(self) -> frozenset[str]:
        """Every word that the purposes name."""
        return frozenset[str]().union(*(request.words for request in self.requests))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every pair of a context and a hallucinated word."""
        return tuple(dict.fromkeys(pair for request in self.requests for pair in request.pairs))

    def unwanted(self, objects: Collection[str] | None) -> frozenset[str]:
        """Return the words to remove from texts about an image with these objects."""
        return frozenset[str]().union(*(request.unwanted(objects) for request in self.requests))

    def applicable(self, objects: Collection[str] | None, named: Collection[str]) -> tuple[EditRequest, ...]:
        """Return the requests that should change a text which names these words, about an image with these objects."""
        return tuple(request for request in self.requests if request.unwanted(objects) & set(named))


def fulfilled(
    requests: Sequence[EditRequest], objects: Collection[str] | None, before: set[str], after: set[str]
) -> bool:
    """Return whether a text does what is requested: unwanted words are gone, and the targets are named.

    `before` and `after` are the words that it names before and after the edit.
    """
    targets = {request.target for request in requests if request.kind == "swap" and request.target}
    unwanted = set().union(*(request.unwanted(objects) & before for request in requests))
    # With cat → dog and dog → cat in one edit, an unwanted word may be the target of another request.
    return targets <= after and not (unwanted - targets) & after


@dataclass(frozen=True)
class SampleScope:
    """The role of a sample's caption, and the requests that should change it."""

    role: str
    objects: frozenset[str] | None
    requests: tuple[EditRequest, ...]
    """Those made for the caption's language."""
    foreign: tuple[EditRequest, ...]
    """Those made for other languages."""


def requests_of(purposes: Sequence[Purpose], lexicon: ObjectLexicon) -> EditRequests:
    """Return the purposes with their words as the data calls these objects."""
    return EditRequests(tuple(_request(purpose, lexicon) for purpose in purposes))


def _request(purpose: Purpose, lexicon: ObjectLexicon) -> EditRequest:
    def canonical(word: str) -> str:
        return lexicon.canonical(word, purpose.language)

    return EditRequest(
        kind=purpose.kind,
        source=canonical(purpose.source) if purpose.source else None,
        target=canonical(purpose.target) if purpose.target else None,
        pairs=tuple((canonical(context), canonical(word)) for context, word in purpose.pairs),
        language=purpose.language,
        samples=frozenset(purpose.samples),
        images=frozenset(purpose.images),
    )


def scope_of(requests: EditRequests, lexicon: ObjectLexicon, sample: Sample, caption: str) -> SampleScope:
    """Return what the edit should do at a sample; `caption` is the model's before the edit."""
    objects = objects_of(sample)
    named = lexicon.named(caption, sample.language)
    applicable = requests.applicable(objects, named)
    covering = tuple(request for request in applicable if request.covers(sample.language))
    # First, because an image that the edit was made on must never count as generality.
    if any(request.made_on(sample) for request in requests.requests):
        role = EDITED
    elif covering:
        role = SOURCE
    else:
        # Unrelated only if neither the image nor any caption of it has a word of the edit.
        present = (objects or frozenset()) | lexicon.named(sample.caption, sample.language) | named
        role = OTHER if any(request.triggers & present for request in requests.requests) else UNRELATED
    return SampleScope(role, objects, covering, tuple(request for request in applicable if request not in covering))
