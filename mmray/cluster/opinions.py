"""The drivers of second opinions and of moved embeddings: settle the units, hand them to actors, write the tables.

RUN/opinions/FINGERPRINT/         the rows of each unit, committed once, as a run's shards are (`mmray.runs`)
RUN/tables/claims.parquet         what the model claimed, and both confidences; `opinions`: the measures; `mistakes`
OUT/run.json, shards/, …          the same of moved embeddings
OUT/tables/answers.parquet        the answers under every condition; `changes`: the measures
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.described import described
from mmray.cluster.finished import Finished
from mmray.cluster.sight_worker import PARTS, Asked, OpinionWorker, PerturbationWorker, Plan, SightWorker
from mmray.cluster.units import mapped
from mmray.cluster.worker import columns_of
from mmray.datasets.columns import Columns
from mmray.datasets.shards import cut
from mmray.datasets.sources import open_source
from mmray.derived import DERIVED, OPINION_SCHEMAS
from mmray.engine import Progress
from mmray.errors import InputError
from mmray.evaluation.ground_truth import survey
from mmray.evaluation.object_words import NONE, ObjectWords, open_words
from mmray.evaluation.opinions.changes import changes
from mmray.evaluation.opinions.judging import judged
from mmray.evaluation.opinions.settings import OpinionSettings, PerturbationSettings, SightSettings
from mmray.models.loading import digest, from_anywhere, resolve
from mmray.perception.alignment import alignment_digest
from mmray.perception.joint import detector_digest
from mmray.results.run import open_run
from mmray.runs import RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.settings import census_settings
from mmray.storage import Store
from mmray.writing import write_table

MOST_MISTAKES = 60
"""Pictures that a run keeps."""


@dataclass(frozen=True, kw_only=True)
class Looked(Finished):
    """What a finished look amounts to."""

    out: str
    samples: int
    rows: int
    measures: list[dict[str, Any]]


def run_opinions(settings: OpinionSettings, follow: Callable[[Progress], None] = lambda _: None) -> Looked:
    """Have a run's model claim and the detector judge, or go on where that was stopped, and write the run's tables.

    Raises InputError for anything wrong with the set-up, before any work.
    """
    run = open_run(settings.run, patient=True)
    census = census_settings(run.info["settings"])
    columns = Columns() if settings.data else columns_of(census)
    asked = Asked(census.dtype, census.trust_remote_code, census.prompt, census.prefix)
    plan = _plan(settings, census.model, settings.data or census.data, columns, asked)
    if not plan.facts.vocabulary:
        raise InputError(f"{plan.data}: no column of objects, without which no claim can be judged")
    own = f"{run.uri}/opinions/{plan.settings.fingerprint(_digests(plan))}"
    with drive_analysis(f"{run.uri}/opinions") as lease:
        return _look(plan, OpinionWorker, RunFolder.at(own, patient=True), run.folder.store, "claims", follow, lease)


def run_perturbation(settings: PerturbationSettings, follow: Callable[[Progress], None] = lambda _: None) -> Looked:
    """Move what a model sees and ask again, or go on where that was stopped, and write the tables of OUT.

    Raises InputError for anything wrong with the set-up, before any work.
    """
    plan = _plan(settings, from_anywhere(settings.model), settings.data, Columns(), Asked())
    if not plan.facts.vocabulary and not (settings.source and settings.target and settings.unrelated):
        raise InputError(f"{plan.data}: no column of objects to draw from; give --source, --target and --unrelated")
    with drive_analysis(settings.out) as lease:
        folder = RunFolder.at(settings.out, patient=True)
        looked = _look(plan, PerturbationWorker, folder, folder.store, "answers", follow, lease)
    if not looked.rows and looked.complete:
        raise InputError(
            f"{plan.data}: no image has objects to move from, to and between; give --source, --target and --unrelated"
        )
    return looked


def _look(
    plan: Plan,
    worker: type[SightWorker],
    folder: RunFolder,
    store: Store,
    name: str,
    follow: Callable[..., None],
    lease: Lease,
) -> Looked:
    began = time.perf_counter()
    settings = plan.settings
    folder.begin(described(settings, _digests(plan), len(plan.manifest.shards)), plan.manifest.to_json())

    def actors(units: list[int]) -> Any:
        pool = pool_for(settings.workers, settings.gpus_per_worker, len(units))
        return mapped(worker, (plan, folder.store.uri), units, pool, ahead=0)

    sizes = [shard.samples for shard in plan.manifest.shards]
    carry_out(folder, sizes, actors, follow, lease, address=settings.address, retry_failed=settings.retry_failed)
    receipts = folder.receipts()

    rows = folder.read_parts(receipts, name, DERIVED[name])
    summary, found = (
        ("opinions", judged(rows, settings.draws, settings.seed))
        if name == "claims"
        else ("changes", changes(rows, settings.draws, settings.seed))
    )
    store = lease.guard(store)
    write_table(store, name, [rows])
    write_table(store, summary, [pa.Table.from_pylist(found, DERIVED[summary])])
    if name == "claims":
        write_table(store, "mistakes", [folder.read_parts(receipts, "mistakes", DERIVED["mistakes"])[:MOST_MISTAKES]])
    outcome = Looked(
        out=store.uri,
        samples=sum(receipt.samples for receipt in receipts.values()),
        rows=len(rows),
        failures=sum(receipt.failures for receipt in receipts.values()),
        quarantined=folder.reasons(receipts),
        measures=found,
        seconds=time.perf_counter() - began,
    )
    folder.finish({"samples": outcome.samples, "failures": outcome.failures})
    return outcome


def _plan(settings: SightSettings, model: str, data: str, columns: Columns, asked: Asked) -> Plan:
    source = open_source(data, columns, captions=False)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{data}: no sample in it")
    if not isinstance(settings, OpinionSettings):
        facts = survey(source, "instances", NONE).facts
        return Plan(settings, model, data, columns, asked, manifest, facts, ObjectWords())
    found = survey(source, settings.ground_truth, settings.synonyms)
    settings = settings.model_copy(update={"ground_truth": found.ground_truth, "synonyms": found.synonyms})
    words = open_words(found.synonyms, found.facts.vocabulary)
    return Plan(settings, model, data, columns, asked, manifest, found.facts, words)


def _digests(plan: Plan) -> dict[str, str]:
    """Return what the rows depend on, each by a digest."""
    detector, alignment, facts = plan.settings.detector, plan.settings.alignment, plan.facts
    translations = map(str, facts.translations.items())
    return {
        "model": digest(resolve(plan.model)),
        # Parts without all these columns can't be continued.
        "rows": ",".join(chain.from_iterable(OPINION_SCHEMAS[name].names for name in PARTS[type(plan.settings)])),
        "data": plan.manifest.digest,
        "cut": str([shard.samples for shard in plan.manifest.shards][:1]) + str(plan.manifest.samples),
        "detector": detector_digest(detector),
        "alignment": alignment_digest(alignment) if alignment else "",
        "asked": json.dumps([plan.asked.dtype, plan.asked.prompt, plan.asked.prefix]),
        "columns": plan.columns.model_dump_json(),
        "objects": hashlib.sha256(repr((sorted(facts.counts.items()), sorted(translations))).encode()).hexdigest()[:16],
        "words": plan.words.digest(),
    }
