"""The plan of an evaluation: its data, the edit's own samples, its texts and records, and their units of work."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmray import engine
from mmray.data.columns import OFF
from mmray.data.samples import text_id
from mmray.data.shards import Manifest, Shard, cut
from mmray.data.source import Source
from mmray.data.sources import open_source
from mmray.detector.joint import detector_digest
from mmray.errors import InputError
from mmray.features.census.inputs import columns_of, open_data
from mmray.features.census.settings import CensusSettings
from mmray.features.editing.edit import Purpose
from mmray.features.editing.files import FACTS_FILE, ROWS_FILE
from mmray.features.evaluation.edit_requests import requests_of
from mmray.features.evaluation.evaluate import text_questions_of
from mmray.features.evaluation.held_out_text import HeldOutText, held_out_texts
from mmray.features.evaluation.mmedit import Records, read_records
from mmray.features.evaluation.pope import open_pope
from mmray.features.evaluation.quality import has_bleu
from mmray.features.evaluation.queries import Edit
from mmray.features.evaluation.settings import EvaluationSettings
from mmray.features.evaluation.tables import PARTS
from mmray.objects.ground_truth import survey
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.pope_files import PopeFiles
from mmray.objects.prompts import TextQuestion
from mmray.objects.statistics import ObjectStatistics
from mmray.objects.words import open_words
from mmray.runs.run import Run
from mmray.storage import Entry, open_object, open_store

COLUMNS = ("image_column", "caption_column", "id_column", "language_column", "objects_column")


@dataclass(frozen=True)
class EvaluationUnit:
    """One unit of work: a shard of the data, own samples of the edit in a shard of the run, texts, or records."""

    kind: str
    """data, own, texts, held_out, records or pope."""
    number: int
    samples: int
    names: tuple[str, ...] = ()
    """Of an own shard: the ids of the edit's samples in it."""
    start: int = 0
    """The first question, text, record or image of released questions; `samples` says how many."""


@dataclass(frozen=True)
class EvaluationContext:
    """All that workers need except the model, the edit and the data."""

    settings: EvaluationSettings
    """The job's, with the defaults that depend on the data."""
    census: CensusSettings
    """The run's settings, for the data to measure on."""
    own: CensusSettings
    """The run's settings as they are: its data holds the edit's own samples."""
    manifest: Manifest
    own_manifest: Manifest | None
    statistics: ObjectStatistics
    texts: tuple[TextQuestion, ...]
    held_out: tuple[HeldOutText, ...]
    records: Records | None
    pope: PopeFiles | None
    """Released questions."""
    cost: dict[str, Any]
    """How the edit was made, and its cost."""


def open_measured(census: CensusSettings) -> Source:
    """Return the source of the data to measure on, which need not have captions."""
    return open_source(census.data, columns_of(census), captions=False)


def plan_evaluation(settings: EvaluationSettings, run: Run, edit: Edit) -> engine.Plan[EvaluationContext]:
    """Return the plan; raises InputError for anything wrong with the settings or the data.

    A unit's payload is an `EvaluationUnit`. Its group is what it reads: the edits of one actor share the baseline
    replies of a group. Units that read different data may have the same identifiers for other samples.
    """
    purposes = edit.purposes
    # Settled here: workers may have other packages installed, and must measure the same.
    settings = settings.model_copy(update={"bleu": has_bleu(settings.bleu)})
    own = CensusSettings(**run.info["settings"])
    columns = {name: value for name in COLUMNS if (value := getattr(settings, name)) is not None}
    census = own.model_copy(update={"data": settings.data, "limit": settings.limit, **columns})
    if run.info["model"].get("image") == "none":
        if settings.decoding:
            raise InputError(f"{census.model}: reads text only; --decoding needs a model that takes images")
        settings, census = _of_texts(settings, census)
    settings = settings.model_copy(update={"prompt": settings.prompt or own.prompt})
    source = open_measured(census)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: has no samples; check --data and --limit")
    found = survey(source, settings.ground_truth, settings.synonyms)
    settings = settings.model_copy(update={"ground_truth": found.ground_truth, "synonyms": found.synonyms})
    statistics = found.statistics
    own_manifest, own_units = _own(run, purposes, manifest)
    words = requests_of(purposes, ObjectLexicon(statistics.vocabulary, statistics.translations)).words
    # A decoding is about images: texts without one are continued by the model alone.
    count = 0 if settings.decoding else settings.text_count
    texts = [] if settings.decoding else text_questions_of(settings, statistics, words)
    held_out = held_out_texts(count, settings.seed)
    records = read_records(settings.mmedit, settings.mmedit_images) if settings.mmedit else None
    units = [EvaluationUnit("data", shard.shard_id, shard.samples) for shard in manifest.shards]
    # The edit's own images lie in the run's data; without them there is no reliability.
    units += own_units
    units += _parts("texts", len(texts), settings.shard_size)
    units += _parts("held_out", len(held_out), settings.shard_size)
    units += _parts("records", len(records.records) if records else 0, settings.shard_size)
    released = open_pope(settings.pope, settings.pope_images) if settings.pope else None
    units += _parts("pope", len(released.images) if released else 0, settings.shard_size)
    context = EvaluationContext(
        settings,
        census,
        own,
        manifest,
        own_manifest,
        statistics,
        tuple(texts),
        tuple(held_out),
        records,
        released,
        edit.facts,
    )
    return engine.Plan(
        [engine.Unit(unit.samples, unit, (unit.kind, unit.number)) for unit in units],
        _digests(context, run, tuple(units)),
        context,
        settings,
    )


def _of_texts(settings: EvaluationSettings, census: CensusSettings) -> tuple[EvaluationSettings, CensusSettings]:
    """Return the settings for a text-only model; raises InputError for measures of images."""
    for option, given in (("--detector", settings.detector), ("--mmedit", settings.mmedit), ("--pope", settings.pope)):
        if given:
            raise InputError(f"{census.model}: reads text only; {option} needs a model that takes images")
    settings = settings.model_copy(update={"pope_objects": 0, "bleu": False})
    return settings, census.model_copy(update={"image_column": OFF, "objects_column": OFF})


def _digests(context: EvaluationContext, run: Run, units: tuple[EvaluationUnit, ...]) -> dict[str, str]:
    """Return the digests of everything that the result depends on."""
    settings = context.settings
    found = {
        "model": run.info["digests"]["model"],
        "data": context.manifest.digest,
        "own": context.own_manifest.digest if context.own_manifest else "",
        "asked": _asked(context, units),
        # Parts of an earlier version may lack a column, and can't be merged with new ones.
        "rows": ",".join(PARTS["measurements"].names),
        "edit": settings.decoding or _edit_digest(settings.subject),
        "encoder": _digest(open_store(settings.encoder).list()) if settings.encoder else "",
    }
    # By content, because `synonyms` may name a file that changes.
    found["words"] = open_words(settings.synonyms, context.statistics.vocabulary).digest()
    if settings.mmedit:
        store, key = open_object(settings.mmedit)
        found["mmedit"] = _digest([store.entry(key)])
    if settings.mmedit_images:
        found["mmedit_images"] = _digest(open_store(settings.mmedit_images).list())
    if context.pope:
        found["pope"] = context.pope.digest
        store = open_store(context.pope.folder)
        found["pope_images"] = _digest([store.entry(name) for name, _ in context.pope.images])
    if settings.detector:
        found["detector"] = detector_digest(settings.detector)
    return found


def _asked(context: EvaluationContext, units: tuple[EvaluationUnit, ...]) -> str:
    """Return a digest of the queries, beyond the data's content."""
    records = context.records and [number for number, _ in context.records.records]
    # Sorted, because equal dicts may list their items in another order.
    statistics = sorted(context.statistics.counts.items()), sorted(map(str, context.statistics.translations.items()))
    return hashlib.sha256(repr((context.texts, context.held_out, records, statistics, units)).encode()).hexdigest()[:16]


def _edit_digest(folder: str) -> str:
    edit = open_store(folder)
    return _digest([edit.entry(name) for name in (FACTS_FILE, ROWS_FILE)])


def _digest(entries: Sequence[Entry | None]) -> str:
    # Versions stand for the content: a folder of images may be too large to read for a digest.
    listed = [(entry.key, entry.size, entry.version) for entry in entries if entry is not None]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def _own(run: Run, purposes: Sequence[Purpose], manifest: Manifest) -> tuple[Manifest | None, list[EvaluationUnit]]:
    """Return the shards of the run's data with the edit's samples, without the rows that are measured anyway.

    If the measured data holds an image in another form (COCO has each image once), the merge drops the own sample.
    """
    own = manifest_without(Manifest.from_json(run.folder.manifest()), manifest)
    samples = {name for purpose in purposes for name in purpose.samples}
    texts = run.info["model"].get("image") == "none"
    if not own.samples or not samples or run.snapshot is None:
        return None, []
    try:
        open_data(CensusSettings(**run.info["settings"]))
    except InputError:
        # The data is gone: the protocol of reliability then says that these images are not at hand.
        return None, []
    by_shard: dict[int, list[str]] = defaultdict(list)
    captions = run.table("captions").select(["sample_id", "shard_id"]).to_pylist()
    for row in captions:
        # An edit of a text-only model knows whole texts, not their windows.
        name = text_id(row["sample_id"]) if texts else row["sample_id"]
        if name in samples:
            by_shard[row["shard_id"]].append(name)
    units = [
        EvaluationUnit("own", shard, len(set(names)), tuple(sorted(set(names))))
        for shard, names in sorted(by_shard.items())
        # A shard whose rows are all measured as data has none left.
        if own.shards[shard].samples
    ]
    return own, units


def manifest_without(own: Manifest, measured: Manifest) -> Manifest:
    """Return shards with the same numbers, without the rows of unchanged files that the measured data has too."""
    files = set(own.files) & set(measured.files)
    shared = {file.path for file in files}
    # Each file is cut from its first row on, so the last stop says how many of its rows are measured.
    stops = {piece.path: piece.stop for shard in measured.shards for piece in shard.pieces if piece.path in shared}
    shards = (
        Shard(
            shard.shard_id,
            tuple(
                replace(piece, start=max(piece.start, stops.get(piece.path, 0)))
                for piece in shard.pieces
                if piece.stop > stops.get(piece.path, 0)
            ),
        )
        for shard in own.shards
    )
    return Manifest(own.files, tuple(shards))


def _parts(kind: str, count: int, size: int) -> list[EvaluationUnit]:
    starts = range(0, count, size)
    return [EvaluationUnit(kind, number, min(size, count - start), start=start) for number, start in enumerate(starts)]
