"""Refresh a run whose data has grown: analyse the new shards, merge them with the old ones, and report the drift."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from mmray.data.limits import check_columns
from mmray.data.shards import Manifest, extend
from mmray.engine import Plan, Progress
from mmray.errors import InputError
from mmray.features.census.drift import Drift, compare
from mmray.features.census.inputs import open_inputs
from mmray.features.census.job import CensusContext, CensusJob, CensusResult, outcome_of, run_planned
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.runs import RunFolder
from mmray.runs.driver import drive
from mmray.runs.home import resolve_settings
from mmray.runs.refreshes import Refresh, begin_refresh, folder_of, latest
from mmray.runs.run import open_run
from mmray.runs.tables import read_table

EXECUTION = frozenset(CensusSettings.execution_settings())
"""Settings that a refresh may change, because they don't change results."""


@dataclass(frozen=True)
class Refreshed:
    """The result of a refresh."""

    outcome: CensusResult
    """Counts of the whole run, but failures, skipped samples and quarantined shards of this refresh alone: a scheduled
    refresh must not fail forever because a sample once did."""
    new_samples: int
    drift: Drift | None
    """None if the data had not grown."""


def refresh_run(uri: str, follow: Callable[[Progress], None] = lambda _: None, **execution: Any) -> Refreshed:
    """Analyse the data that the run's source has gained, merge it, and compare the tables with those before.

    `execution` takes settings that don't change results, such as `workers`; all others are the run's. A refresh or
    census that was interrupted is finished first. Raises InputError if data already analysed has changed.
    """
    began = time.perf_counter()
    folder = RunFolder.at(uri)
    info = folder.info()
    if info is None:
        raise InputError(f"{uri}: no run here (no run.json); give a folder that mmray census wrote")
    given = {name: value for name, value in execution.items() if value is not None}
    if other := given.keys() - EXECUTION:
        raise InputError(f"{', '.join(sorted(other))}: a refresh keeps the run's settings")
    out = folder.store.uri
    known = resolve_settings(info["settings"], info["home"])
    # run.json keeps all settings of the first call, but these two were meant for that call alone.
    settings = census_settings(known | {"retry_failed": False, "local": False} | given | {"out": out})
    job = CensusJob(settings)
    with drive(folder) as lease:
        source, _, nouns = open_inputs(settings)
        before = Manifest.from_json(folder.manifest())
        # Raises for files that have changed: only new rows may be added to what was analysed.
        size, limit = settings.samples_per_shard, settings.limit
        after = extend(before, source.files(), size, limit, source.rows_digest, source.image_end)
        if after.samples > before.samples:
            check_columns(source, after)
        last = latest(folder.store)
        # Finish what an interrupted call left; this does nothing if the run is complete.
        done = run_planned(settings, job.plan_for(source, before, nouns), follow, lease)
        # With --retry-failed all shards are reported: those that failed before may have been done now.
        reported = _reported_shards(folder, before, last, already=done.already_done) if not settings.retry_failed else 0
        drift = _write_drift(folder, last)
        if after.samples > before.samples:
            plan = job.plan_for(source, after, nouns)
            # Copies the old tables for the comparison before any new work.
            begun = begin_refresh(folder.store, _run_info(settings, plan), after.to_json())
            done = run_planned(settings, plan, follow, lease)
            drift = _write_drift(folder, begun)
    finished = replace(done, seconds=time.perf_counter() - began)
    return Refreshed(outcome_of(settings, finished, since=reported), after.samples - before.samples, drift)


def _run_info(settings: CensusSettings, plan: Plan[CensusContext]) -> dict[str, Any]:
    """Return the entries of run.json that a refresh changes."""
    return {
        "digests": dict(plan.digests),
        "fingerprint": settings.fingerprint(plan.digests),
        "data": plan.run_info["data"],
        "shards": len(plan.units),
    }


def _reported_shards(folder: RunFolder, manifest: Manifest, last: Refresh, *, already: bool) -> int:
    """Return the number of first shards that an earlier call finished and reported."""
    if already:
        return len(manifest.shards)
    if not last.number:
        return 0  # the first census itself was interrupted
    earlier = f"{folder_of(last.number - 1)}/manifest.json" if last.number > 1 else "manifest.json"
    return len(Manifest.from_json(folder.store.read(earlier)).shards)


def _write_drift(folder: RunFolder, refresh: Refresh) -> Drift | None:
    """Write and return the drift of a finished refresh; None if there is none or it is written already."""
    key = f"{refresh.folder}/drift.json"
    if not refresh.number or folder.store.exists(key):
        return None
    run = open_run(folder.store.uri)
    drift = compare(_TablesBefore(run.info, folder, f"{refresh.folder}/before"), run)
    folder.store.put(key, json.dumps(drift.summary(), indent=1).encode())
    return drift


@dataclass(frozen=True)
class _TablesBefore:
    """A run's tables as they were before a refresh."""

    info: dict[str, Any]
    folder: RunFolder
    prefix: str

    def table(self, name: str) -> pa.Table:
        return read_table(self.folder.store, name, self.prefix)
