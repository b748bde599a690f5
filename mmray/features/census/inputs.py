"""The inputs of a census: the data that its settings name, the shards cut from it, and the source of its nouns."""

from __future__ import annotations

from collections import deque
from itertools import islice

from mmray.data.columns import OFF, Columns
from mmray.data.shards import Manifest, cut, read_shard
from mmray.data.source import Source
from mmray.data.sources import open_source
from mmray.errors import InputError
from mmray.features.census.settings import CensusSettings
from mmray.neurons.concepts import NounSource, noun_source
from mmray.storage import lies_in, open_store

FIRST_SAMPLES = 16
"""Samples that the driver reads before any work."""


def columns_of(settings: CensusSettings) -> Columns:
    """Return the columns that the settings name."""
    return Columns(
        image=settings.image_column,
        caption=settings.caption_column,
        sample_id=settings.id_column,
        language=settings.language_column,
        caption_language=settings.language,
        domain=settings.domain_column,
        objects=settings.objects_column,
        boxes=settings.boxes_column,
        questions=settings.questions_column,
        labels=tuple(settings.label_column or ()),
        background=settings.background,
    )


def text_settings(settings: CensusSettings) -> CensusSettings:
    """Return the settings for a text-only model, which leaves out images of the data.

    Raises InputError for settings that need images.
    """
    unfit = {
        "--captions generate": settings.captions == "generate",
        f"--module {settings.module}": settings.module != "language",
        "--score gradient": settings.score == "gradient",
        f"--image-column {settings.image_column}": settings.image_column not in (None, OFF),
    }
    if wrong := [option for option, given in unfit.items() if given]:
        raise InputError(f"{settings.model}: reads text only; {wrong[0]} needs a model that takes images")
    return settings.model_copy(update={"image_column": OFF})


def open_data(settings: CensusSettings) -> Source:
    """Return the source of the settings' data."""
    return open_source(settings.data, columns_of(settings), captions=settings.captions == "dataset")


def open_inputs(settings: CensusSettings) -> tuple[Source, Manifest, NounSource]:
    """Return the data, its shards as they would be cut now, and the source of nouns."""
    source = open_data(settings)
    manifest = cut(source.files(), settings.samples_per_shard, settings.limit, source.image_end)
    if not manifest.samples:
        raise InputError(f"{settings.data}: has no samples; check --data and --limit")
    # Reading logs the columns and entries that it ignores. Workers' logs are not shown, so the driver reads some, too.
    deque(islice(read_shard(source, manifest.shards[0]), FIRST_SAMPLES), maxlen=0)
    vocabulary = source.objects_vocabulary() if settings.nouns in ("auto", "objects") else ()
    return source, manifest, noun_source(settings.nouns, vocabulary, source.translations())


def check_apart(out: str, source: Source) -> None:
    """Raise InputError if the run's folder would lie in the folder of its data, or the data in the run's folder."""
    location = source.location
    if not location.folder:
        return
    uri = open_store(out).uri
    folder = open_store(location.folder).uri
    # A source of listed files reads only those, so a run next to them is fine; a whole folder is read again later.
    whole = location.whole or not location.entries
    if whole and lies_in(uri, folder):
        raise InputError(f"--out {out}: lies in the data's folder {folder}; choose an OUT outside it")
    if (whole and lies_in(folder, uri)) or any(lies_in(f"{folder}/{entry.key}", uri) for entry in location.entries):
        raise InputError(f"--out {out}: contains the data {source.data}; choose a folder of the run's own")
