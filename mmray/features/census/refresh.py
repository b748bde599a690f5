"""Take in what a run's data has gained: new shards only, merged with what was there, and compared with it."""

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
"""Settings that a refresh may be given: they leave the run's results alone."""


@dataclass(frozen=True)
class Refreshed:
    """What a refresh amounts to; no drift where the data had gained nothing."""

    outcome: CensusResult
    """Of the whole run. Only failures, skipped samples and quarantined shards are those of what this refresh analysed:
    a scheduled refresh must not fail forever because a sample once did."""
    new_samples: int
    drift: Drift | None


def refresh_run(uri: str, follow: Callable[[Progress], None] = lambda _: None, **execution: Any) -> Refreshed:
    """Analyse what the run's data has gained since, merge, and compare with before.

    `execution` are settings that leave the result alone, such as `workers`; all others are the run's. A refresh or a
    census that was stopped is brought to its end first. Raises InputError if data that was analysed has changed.
    """
    began = time.perf_counter()
    folder = RunFolder.at(uri)
    info = folder.info()
    if info is None:
        raise InputError(f"{uri}: no run here (no run.json); give a folder that mmray census wrote")
    given = {name: value for name, value in execution.items() if value is not None}
    if strange := given.keys() - EXECUTION:
        raise InputError(f"{', '.join(sorted(strange))}: a refresh keeps the run's settings")
    out = folder.store.uri
    known = resolve_settings(info["settings"], info["home"])
    # What was asked for once is no habit of the run.
    settings = census_settings(known | {"retry_failed": False, "local": False} | given | {"out": out})
    job = CensusJob(settings)
    with drive(folder) as lease:
        source, _, nouns = open_inputs(settings)
        before = Manifest.from_json(folder.manifest())
        after = extend(before, source.files(), settings.shard_size, settings.limit, source.rows_digest)
        if after.samples > before.samples:
            check_columns(source, after)
        last = latest(folder.store)
        done = run_planned(settings, job.plan_for(source, before, nouns), follow, lease)
        settled = _settled(folder, before, last, already=done.already) if not settings.retry_failed else 0
        drift = _settle(folder, last)
        if after.samples > before.samples:
            plan = job.plan_for(source, after, nouns)
            begun = begin_refresh(folder.store, _changes(settings, plan), after.to_json())
            done = run_planned(settings, plan, follow, lease)
            drift = _settle(folder, begun)
    finished = replace(done, seconds=time.perf_counter() - began)
    return Refreshed(outcome_of(settings, finished, since=settled), after.samples - before.samples, drift)


def _changes(settings: CensusSettings, plan: Plan[CensusContext]) -> dict[str, Any]:
    """Return what a refresh changes in run.json."""
    return {
        "digests": dict(plan.digests),
        "fingerprint": settings.fingerprint(plan.digests),
        "data": plan.facts["data"],
        "shards": len(plan.units),
    }


def _settled(folder: RunFolder, manifest: Manifest, last: Refresh, *, already: bool) -> int:
    """Return how many shards, the first ones, an earlier call brought to their end and told of."""
    if already:
        return len(manifest.shards)
    if not last.number:
        return 0
    earlier = f"{folder_of(last.number - 1)}/manifest.json" if last.number > 1 else "manifest.json"
    return len(Manifest.from_json(folder.store.read(earlier)).shards)


def _settle(folder: RunFolder, refresh: Refresh) -> Drift | None:
    """Write what a refresh that has been analysed changed, unless that is known already."""
    key = f"{refresh.folder}/drift.json"
    if not refresh.number or folder.store.exists(key):
        return None
    run = open_run(folder.store.uri)
    drift = compare(_Before(run.info, folder, f"{refresh.folder}/before"), run)
    folder.store.put(key, json.dumps(drift.summary(), indent=1).encode())
    return drift


@dataclass(frozen=True)
class _Before:
    """A run as it was before a refresh."""

    info: dict[str, Any]
    folder: RunFolder
    place: str

    def table(self, name: str) -> pa.Table:
        return read_table(self.folder.store, name, self.place)
