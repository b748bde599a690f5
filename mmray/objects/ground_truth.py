"""Which objects count as being in an image: annotated ones, those that human captions name, or both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmray.data.rows import BadRowError, object_names
from mmray.data.samples import Sample
from mmray.data.source import Source
from mmray.errors import InputError
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.statistics import GroundTruth, ObjectStatistics, gather_statistics
from mmray.objects.words import COCO, open_words, table_for


@dataclass(frozen=True)
class Survey:
    """Object statistics of data under a ground truth, with the defaults of both settings resolved."""

    statistics: ObjectStatistics
    ground_truth: GroundTruth
    synonyms: str


def survey(source: Source, ground_truth: GroundTruth | None, synonyms: str | None) -> Survey:
    """Return the object statistics of the whole data.

    The default ground truth is the union (as in CHAIR) where rows list the captions and objects of their image, else
    the annotated objects. Raises InputError for a ground truth that the data can't give.
    """
    rows = list(_annotations(source))
    annotated = source.columns.objects is not None
    captioned = any(row.captions for row in rows)
    references: dict[str, tuple[str, ...]] = {}
    if ground_truth is None:
        ground_truth = "union" if annotated and captioned else "instances"
    elif ground_truth != "instances" and not captioned:
        # Captions are in several rows. Only on request, because every image is read to find the rows that share it.
        rows = list(_samples(source))
        references = captions_by_image((row.image, caption) for row in rows for caption in row.captions)
        rows = [replace(row, captions=references.get(row.image, ())) for row in rows]
        if not references:
            raise InputError(f"--ground-truth {ground_truth}: {source.data} has no captions; give instances")
    if ground_truth == "union" and not annotated:
        raise InputError(f"--ground-truth union: {source.data} has no objects; put COCO's instances file next to it")
    vocabulary = tuple(dict.fromkeys(name.casefold() for row in rows for name in row.objects or ()))
    # Without objects of its own, data can only be searched for known ones.
    if ground_truth == "captions" and not vocabulary and synonyms is None:
        synonyms = COCO
    synonyms = table_for(synonyms, vocabulary)
    translations = source.translations()
    lexicon = ObjectLexicon(vocabulary, translations, open_words(synonyms, vocabulary))
    objects = (objects_in_image(row.objects, row.captions, row.language, ground_truth, lexicon) for row in rows)
    return Survey(gather_statistics(objects, translations, vocabulary, references), ground_truth, synonyms)


def captions_by_image(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Return image key → its distinct captions, from pairs of a sample's image key and caption."""
    found: dict[str, dict[str, None]] = {}
    for image, caption in pairs:
        if caption:
            found.setdefault(image, {})[caption] = None
    return {image: tuple(captions) for image, captions in found.items()}


def objects_in_image(
    annotated: Sequence[str] | None,
    captions: Sequence[str],
    language: str | None,
    ground_truth: GroundTruth,
    lexicon: ObjectLexicon,
) -> tuple[str, ...] | None:
    """Return the distinct objects that count as being in an image, annotated ones first; None: unknown."""
    # An empty list says that there are no objects; None, that nobody has looked.
    listed = None if annotated is None else [name.casefold() for name in annotated]
    named = [mention.concept for caption in captions for mention in lexicon.mentions(caption, language)]
    if ground_truth == "captions":
        found = named if captions else None
    else:
        found = listed + named if listed is not None and ground_truth == "union" else listed
    return None if found is None else tuple(dict.fromkeys(found))


def with_ground_truth(
    sample: Sample, ground_truth: GroundTruth, lexicon: ObjectLexicon, references: Mapping[str, tuple[str, ...]]
) -> Sample:
    """Return the sample with the objects that count as being in its image.

    `references`: image key → all its captions, for samples that don't hold them.
    """
    if ground_truth == "instances":
        return sample
    captions = sample.references or references.get(sample.image_key, ())
    objects = objects_in_image(sample.objects, captions, sample.language, ground_truth, lexicon)
    # Unknown objects are not no objects: such a sample must not be asked about.
    if objects is None:
        return replace(sample, objects=None, boxes=None)
    pairs = zip(sample.objects or (), sample.boxes or (), strict=False)
    boxed = [(name, box) for name, box in pairs if name.casefold() in objects]
    with_box = {name.casefold() for name, _ in boxed}
    return replace(
        sample,
        # Boxes belong to objects by position, so objects that captions add have to come last.
        objects=(*(name for name, _ in boxed), *(name for name in objects if name not in with_box)),
        boxes=None if sample.boxes is None else tuple(box for _, box in boxed),
    )


@dataclass(frozen=True)
class _Row:
    objects: tuple[str, ...] | None
    captions: tuple[str, ...]
    language: str | None = None
    image: str = ""


def _annotations(source: Source) -> Iterator[_Row]:
    """Yield each row's objects and captions, skipping rows whose objects can't be read: jobs report those as failed."""
    for cell, captions in source.annotations():
        try:
            yield _Row(None if cell is None else object_names(cell), captions)
        except BadRowError:
            continue


def _samples(source: Source) -> Iterator[_Row]:
    """Yield objects, caption and image key of every sample, skipping rows that can't be read."""
    for file in source.files():
        for row in source.read(file.path, 0, file.rows):
            if isinstance(row, Sample):
                yield _Row(row.objects, (row.caption,), row.language, row.image_key)
