"""The driver of properties: settle concepts and images, hand them to actors, sum up what they observed, write tables.

RUN/properties/FINGERPRINT/       the rows of each unit, committed once, as a run's shards are (`mmray.runs`)
RUN/tables/properties.parquet     the measures with their intervals
RUN/tables/heatmaps.parquet       the heat maps
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.census import Progress
from mmray.cluster.described import described, digests_of
from mmray.cluster.finished import Finished
from mmray.cluster.properties_plan import Plan, plan_properties
from mmray.cluster.properties_worker import PropertiesWorker
from mmray.cluster.units import mapped
from mmray.derived import PROPERTY_SCHEMAS
from mmray.evaluation.properties.observations import summarise
from mmray.evaluation.properties.settings import PropertySettings
from mmray.results.run import Run, open_run
from mmray.runs import RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.writing import write_table


@dataclass(frozen=True, kw_only=True)
class Properties(Finished):
    """What finished measuring amounts to."""

    run: str
    concepts: int
    heatmaps: int


def run_properties(settings: PropertySettings, follow: Callable[[Progress], None] = lambda _: None) -> Properties:
    """Measure a run's properties to the end, or go on where that was stopped, and write the tables.

    `follow` hears of every committed unit; it counts concepts. Raises InputError for anything wrong with the set-up.
    """
    began = time.perf_counter()
    run = open_run(settings.run, patient=True)
    with drive_analysis(f"{run.uri}/properties") as lease:
        return _measure(settings, run, lease, follow, began)


def _measure(
    settings: PropertySettings, run: Run, lease: Lease, follow: Callable[[Progress], None], began: float
) -> Properties:
    plan = plan_properties(settings, run)
    folder, info = _folder(plan, run)
    folder.begin(info, json.dumps([[facts.concept for facts in unit] for unit in plan.units]).encode())
    _work(plan, folder, follow, lease)
    receipts = folder.receipts()
    observed, maps = (
        folder.read_parts(receipts, name, PROPERTY_SCHEMAS[name]) for name in ("observations", "heatmaps")
    )
    store = lease.guard(run.folder.store)
    # A part that was not asked for keeps the table that an earlier call wrote.
    if settings.only != "maps":
        write_table(store, "properties", [summarise(observed, settings.draws, settings.seed, plan.images)])
    if settings.only != "properties":
        write_table(store, "heatmaps", [maps])
    outcome = Properties(
        run=settings.run,
        concepts=plan.concepts,
        heatmaps=len(maps),
        failures=sum(receipt.failures for receipt in receipts.values()),
        shards_aside=folder.reasons(receipts),
        seconds=time.perf_counter() - began,
    )
    folder.finish({"concepts": outcome.concepts, "failures": outcome.failures})
    return outcome


def _folder(plan: Plan, run: Run) -> tuple[RunFolder, dict[str, Any]]:
    """Return where the rows lie, and what that folder says of itself."""
    info = described(plan.settings, digests_of(run) | {"units": plan.digest()}, len(plan.units))
    return RunFolder.at(f"{run.uri}/properties/{info['fingerprint']}", patient=True), info


def _work(plan: Plan, folder: RunFolder, follow: Callable[[Progress], None], lease: Lease) -> None:
    """Have every unit that is neither committed nor set aside measured; progress counts concepts."""
    carry_out(
        folder,
        [len(unit) for unit in plan.units],
        lambda units: _actors(plan, folder, units),
        follow,
        lease,
        address=plan.settings.address,
        retry_failed=plan.settings.retry_failed,
    )


def _actors(plan: Plan, folder: RunFolder, units: list[int]) -> Any:
    pool = pool_for(plan.settings.workers, plan.settings.gpus_per_worker, len(units))
    return mapped(PropertiesWorker, (plan, folder.store.uri), units, pool, ahead=0)
