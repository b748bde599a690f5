"""Which objects count as being in an image: those annotated, those that people's captions name, or both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmray.data.rows import BadRowError, object_names
from mmray.data.samples import Sample
from mmray.data.source import Source
from mmray.errors import InputError
from mmray.objects.naming import ObjectLexicon, object_naming
from mmray.objects.statistics import GroundTruth, ObjectStatistics, gather_statistics
from mmray.objects.words import COCO, open_words, table_for


@dataclass(frozen=True)
class Survey:
    """The facts of data under a ground truth, and the settings that were chosen for it where none were given."""

    facts: ObjectStatistics
    ground_truth: GroundTruth
    synonyms: str


def survey(source: Source, ground_truth: GroundTruth | None, synonyms: str | None) -> Survey:
    """Return what questions need to know of the whole data.

    By default ground truth is the union (as CHAIR's) where rows hold all captions and the objects of their image, else
    the annotated objects. Captions in several rows are brought together only where they are asked for, because every
    image is read to tell which rows share one. Raises InputError for a ground truth that the data can't give.
    """
    rows = list(_annotations(source))
    annotated = source.columns.objects is not None
    captioned = any(row.captions for row in rows)
    references: dict[str, tuple[str, ...]] = {}
    if ground_truth is None:
        ground_truth = "union" if annotated and captioned else "instances"
    elif ground_truth != "instances" and not captioned:
        rows = list(_samples(source))
        references = captions_by_image((row.image, caption) for row in rows for caption in row.captions)
        rows = [replace(row, captions=references.get(row.image, ())) for row in rows]
        if not references:
            raise InputError(f"--ground-truth {ground_truth}: {source.data} has no captions; give instances")
    if ground_truth == "union" and not annotated:
        raise InputError(f"--ground-truth union: {source.data} has no objects; put COCO's instances file next to it")
    vocabulary = tuple(dict.fromkeys(name.casefold() for row in rows for name in row.objects or ()))
    if ground_truth == "captions" and not vocabulary and synonyms is None:
        synonyms = COCO
    synonyms = table_for(synonyms, vocabulary)
    translations = source.translations()
    naming = object_naming(vocabulary, translations, open_words(synonyms, vocabulary))
    there = (objects_there(row.objects, row.captions, row.language, ground_truth, naming) for row in rows)
    return Survey(gather_statistics(there, translations, vocabulary, references), ground_truth, synonyms)


def captions_by_image(said: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Return key of an image → its distinct captions, from pairs of a sample's image key and its caption."""
    found: dict[str, dict[str, None]] = {}
    for image, caption in said:
        if caption:
            found.setdefault(image, {})[caption] = None
    return {image: tuple(captions) for image, captions in found.items()}


def objects_there(
    annotated: Sequence[str] | None,
    captions: Sequence[str],
    language: str | None,
    ground_truth: GroundTruth,
    naming: ObjectLexicon,
) -> tuple[str, ...] | None:
    """Return the distinct objects that count as being in an image, annotated ones first; None: not known."""
    listed = None if annotated is None else [name.casefold() for name in annotated]
    named = [mention.concept for caption in captions for mention in naming.mentions(caption, language)]
    if ground_truth == "captions":
        found = named if captions else None
    else:
        found = listed + named if listed is not None and ground_truth == "union" else listed
    return None if found is None else tuple(dict.fromkeys(found))


def with_ground_truth(
    sample: Sample, ground_truth: GroundTruth, naming: ObjectLexicon, references: Mapping[str, tuple[str, ...]]
) -> Sample:
    """Return the sample with what counts as its objects; those that have boxes come first, as boxes need it.

    `references`: key of an image → all its captions, for samples that don't hold them.
    """
    if ground_truth == "instances":
        return sample
    captions = sample.references or references.get(sample.image_key, ())
    there = objects_there(sample.objects, captions, sample.language, ground_truth, naming)
    if there is None:
        return replace(sample, objects=None, boxes=None)
    boxes = sample.boxes or ()
    kept = [(name, box) for name, box in zip(sample.objects or (), boxes, strict=False) if name.casefold() in there]
    known = {name.casefold() for name, _ in kept}
    return replace(
        sample,
        objects=(*(name for name, _ in kept), *(name for name in there if name not in known)),
        boxes=None if sample.boxes is None else tuple(box for _, box in kept),
    )


@dataclass(frozen=True)
class _Row:
    objects: tuple[str, ...] | None
    captions: tuple[str, ...]
    language: str | None = None
    image: str = ""


def _annotations(source: Source) -> Iterator[_Row]:
    """Yield each row's objects and captions; rows whose objects can't be read are passed over, for they fail."""
    for cell, captions in source.annotations():
        try:
            yield _Row(None if cell is None else object_names(cell), captions)
        except BadRowError:
            continue


def _samples(source: Source) -> Iterator[_Row]:
    """Yield the objects, the caption and the image's key of every sample; rows that can't be read are passed over."""
    for file in source.files():
        for row in source.read(file.path, 0, file.rows):
            if isinstance(row, Sample):
                yield _Row(row.objects, (row.caption,), row.language, row.image_key)
