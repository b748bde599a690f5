"""Which objects count as being in an image: those annotated, those that people's captions name, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmray.datasets.contents import Source
from mmray.datasets.rows import BadRowError, object_names
from mmray.datasets.samples import Sample
from mmray.errors import InputError
from mmray.evaluation.facts import DataFacts, GroundTruth, gather_facts
from mmray.evaluation.naming import Naming, object_naming
from mmray.evaluation.object_words import COCO, open_words, table_for


@dataclass(frozen=True)
class Survey:
    """The facts of data under a ground truth, and the settings that were chosen for it where none were given."""

    facts: DataFacts
    ground_truth: GroundTruth
    synonyms: str


def survey(source: Source, ground_truth: GroundTruth | None, synonyms: str | None) -> Survey:
    """Return what questions need to know of the whole data.

    By default ground truth is the union (as CHAIR's) where the source knows the captions and the objects of images,
    else the annotated objects. Raises InputError for a ground truth that the data can't give.
    """
    rows = list(_annotations(source))
    annotated = source.columns.objects is not None
    captioned = any(captions for _, captions in rows)
    if ground_truth is None:
        ground_truth = "union" if annotated and captioned else "instances"
    if ground_truth != "instances" and not captioned:
        raise InputError(
            f"--ground-truth {ground_truth}: {source.data} has no captions next to each image's objects, as COCO's "
            "captions files have; give instances"
        )
    if ground_truth == "union" and not annotated:
        raise InputError(f"--ground-truth union: {source.data} has no objects; put COCO's instances file next to it")
    vocabulary = tuple(dict.fromkeys(name.casefold() for names, _ in rows for name in names or ()))
    if ground_truth == "captions" and not vocabulary and synonyms is None:
        synonyms = COCO
    synonyms = table_for(synonyms, vocabulary)
    translations = source.translations()
    naming = object_naming(vocabulary, translations, open_words(synonyms, vocabulary))
    there = (objects_there(names, captions, None, ground_truth, naming) for names, captions in rows)
    return Survey(gather_facts(there, translations, vocabulary), ground_truth, synonyms)


def objects_there(
    annotated: Sequence[str] | None,
    captions: Sequence[str],
    language: str | None,
    ground_truth: GroundTruth,
    naming: Naming,
) -> tuple[str, ...] | None:
    """Return the distinct objects that count as being in an image, annotated ones first; None: not known."""
    listed = None if annotated is None else [name.casefold() for name in annotated]
    named = [mention.concept for caption in captions for mention in naming.mentions(caption, language)]
    if ground_truth == "captions":
        found = named if captions else None
    else:
        found = listed + named if listed is not None and ground_truth == "union" else listed
    return None if found is None else tuple(dict.fromkeys(found))


def with_ground_truth(sample: Sample, ground_truth: GroundTruth, naming: Naming) -> Sample:
    """Return the sample with what counts as its objects; those that have boxes come first, as boxes need it."""
    if ground_truth == "instances":
        return sample
    there = objects_there(sample.objects, sample.references, sample.language, ground_truth, naming)
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


def _annotations(source: Source) -> Iterator[tuple[tuple[str, ...] | None, tuple[str, ...]]]:
    """Yield each row's objects and captions; rows whose objects can't be read are passed over, for they fail."""
    for cell, captions in source.annotations():
        try:
            yield None if cell is None else object_names(cell), captions
        except BadRowError:
            continue
