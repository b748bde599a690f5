"""The driver of saliency measures: settle the images, hand them to actors, sum up what they observed, write tables.

RUN/saliency/FINGERPRINT/            the rows of each unit, committed once
RUN/tables/saliency.parquet          the measures of every method, with their intervals
RUN/tables/saliency_maps.parquet     maps of some images, for the report
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.census import open_inputs
from mmray.cluster.described import described, digests_of
from mmray.cluster.finished import Finished
from mmray.cluster.saliency_worker import SaliencyPlan, SaliencyWorker
from mmray.cluster.units import mapped
from mmray.datasets.shards import Manifest
from mmray.derived import SALIENCY_SCHEMAS
from mmray.engine import Progress
from mmray.errors import InputError
from mmray.evaluation.saliency import summarise_saliency
from mmray.image_keys import image_keys, one_per_image
from mmray.perception.alignment import alignment_digest
from mmray.perception.joint import detector_digest, detector_or_demo
from mmray.perception.settings import SaliencySettings
from mmray.results.run import Run, open_run
from mmray.runs import RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.settings import census_settings
from mmray.writing import write_table

TOGETHER = 16
"""Images of a unit of work."""
SEVERAL = 2
"""Different nouns of a caption that is worth a look: its image may have several objects."""


@dataclass(frozen=True, kw_only=True)
class Judged(Finished):
    """What finished measures amount to."""

    run: str
    images: int
    words: int


def run_saliency(settings: SaliencySettings, follow: Callable[[Progress], None] = lambda _: None) -> Judged:
    """Measure the saliency of a run's words to the end, or go on where that was stopped, and write the tables.

    `follow` hears of every committed unit; it counts images. Raises InputError for anything wrong with the set-up, and
    where the data has no boxes.
    """
    began = time.perf_counter()
    run = open_run(settings.run, patient=True)
    with drive_analysis(f"{run.uri}/saliency") as lease:
        return _judge(settings, run, lease, follow, began)


def _judge(
    settings: SaliencySettings, run: Run, lease: Lease, follow: Callable[[Progress], None], began: float
) -> Judged:
    plan = plan_saliency(settings, run)
    folder, info = _folder(plan, run)
    folder.begin(info, json.dumps(plan.units).encode())
    carry_out(
        folder,
        [len(unit) for unit in plan.units],
        lambda units: mapped(
            SaliencyWorker,
            (plan, folder.store.uri),
            units,
            pool_for(settings.workers, settings.gpus_per_worker, len(units)),
            ahead=0,
        ),
        follow,
        lease,
        address=settings.address,
        retry_failed=settings.retry_failed,
    )
    receipts = folder.receipts()
    observed, maps = (
        folder.read_parts(receipts, name, SALIENCY_SCHEMAS[name]) for name in ("observations", "saliency_maps")
    )
    aside = folder.reasons(receipts)
    if not len(observed) and not aside:
        raise InputError(
            f"{run.uri}: of {len(plan.captions):,} images drawn none has several objects and their boxes; see "
            "--boxes-column of a census, and --images"
        )
    if len(observed):
        store = lease.guard(run.folder.store)
        measured = summarise_saliency(observed, settings.draws, settings.seed, plan.images)
        write_table(store, "saliency", [measured])
        write_table(store, "saliency_maps", [maps])
    words = {(row["sample_id"], row["concept"]) for row in observed.select(["sample_id", "concept"]).to_pylist()}
    outcome = Judged(
        run=settings.run,
        images=len({sample for sample, _ in words}),
        words=len(words),
        failures=sum(receipt.failures for receipt in receipts.values()),
        quarantined=aside,
        seconds=time.perf_counter() - began,
    )
    folder.finish({"images": outcome.images, "failures": outcome.failures})
    return outcome


def plan_saliency(settings: SaliencySettings, run: Run) -> SaliencyPlan:
    """Settle which images are judged: drawn among those with a caption of several nouns, the first by name of each."""
    census = census_settings(run.info["settings"] | {"captions": "dataset"})
    rows = {row["sample_id"]: row for row in run.table("captions").to_pylist()}
    nouns: dict[str, set[str]] = defaultdict(set)
    for row in run.table("occurrences").select(["concept", "sample_id"]).to_pylist():
        nouns[row["sample_id"]].add(row["concept"])
    keys = image_keys(run.table("captions"))
    several = one_per_image(sorted(sample for sample, found in nouns.items() if len(found) >= SEVERAL), keys)
    chosen = random.Random(settings.seed).sample(several, min(settings.images, len(several)))
    if not chosen:
        raise InputError(f"{run.uri}: no caption with several nouns, so that pointing at one of them would be no test")
    by_shard = sorted(chosen, key=lambda name: (rows[name]["shard_id"], name))
    _, _, source = open_inputs(census_settings(run.info["settings"]))
    return SaliencyPlan(
        settings=settings,
        census=census,
        manifest=Manifest.from_json(run.folder.manifest()),
        nouns=source,
        units=tuple(tuple(by_shard[start : start + TOGETHER]) for start in range(0, len(by_shard), TOGETHER)),
        shards={name: rows[name]["shard_id"] for name in chosen},
        captions={name: rows[name]["caption"] for name in chosen},
        images={name: keys[name] for name in chosen},
        pictured=frozenset(chosen[: settings.maps]),
        located=_located(run),
    )


def _located(run: Run) -> Mapping[str, tuple[list[tuple[int, int]], list[float]]]:
    """Return concept → the ten neurons that the run ranks highest by `specific`, with the signs of their activation."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    columns = "concept, layer, unit, activation"
    ranked = run.sql(f"select {columns} from rankings where specific_rank <= 10 order by concept, specific_rank")
    for row in ranked.to_pylist():
        found[row["concept"]].append(row)
    return {
        name: (
            [(row["layer"], row["unit"]) for row in rows],
            [1.0 if row["activation"] >= 0 else -1.0 for row in rows],
        )
        for name, rows in found.items()
    }


def _folder(plan: SaliencyPlan, run: Run) -> tuple[RunFolder, dict[str, Any]]:
    """Return where the rows lie, and what that folder says of itself."""
    settings = plan.settings
    detector = detector_or_demo(settings.detector, plan.census.model)
    digests = digests_of(run) | {
        "units": hashlib.sha256(repr(plan.units).encode()).hexdigest()[:16],
        "detector": detector_digest(detector) if detector else "",
        "alignment": alignment_digest(settings.alignment) if settings.alignment else "",
    }
    info = described(settings, digests, len(plan.units))
    return RunFolder.at(f"{run.uri}/saliency/{info['fingerprint']}", patient=True), info
