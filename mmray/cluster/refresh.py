"""Take in what a run's data has gained: new shards only, merged with what was there, and compared with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmray.cluster.census import Outcome, finish, open_inputs, outcome, run_info, unfinished
from mmray.datasets.limits import check_columns
from mmray.datasets.shards import Manifest, extend
from mmray.engine import Progress
from mmray.errors import InputError
from mmray.results.drift import Drift, compare
from mmray.results.run import open_run
from mmray.runs import RunFolder
from mmray.runs.driver import drive
from mmray.runs.folder import check_same
from mmray.runs.home import resolve_settings
from mmray.runs.refreshes import Refresh, begin_refresh, folder_of, latest
from mmray.settings import EXECUTION, CensusSettings, census_settings
from mmray.tables import read_table

CHANGED = ("digests", "fingerprint", "data", "shards")
"""What a refresh changes in run.json."""


@dataclass(frozen=True)
class Refreshed:
    """What a refresh amounts to; no drift where the data had gained nothing."""

    outcome: Outcome
    """Of the whole run. Only failures, skipped samples and shards set aside are those of what this refresh analysed: a
    scheduled refresh must not fail forever because a sample once did."""
    new_samples: int
    drift: Drift | None


def refresh_run(uri: str, follow: Callable[[Progress], None] = lambda _: None, **execution: Any) -> Refreshed:
    """Analyse what the run's data has gained since, merge, and compare with before.

    `execution` are settings that leave the result alone, such as `workers`; all others are the run's. A refresh or a
    census that was stopped is brought to its end first. Raises InputError if data that was analysed has changed.
    """
    began = time.perf_counter()
    folder = RunFolder.at(uri, patient=True)
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
    with drive(folder) as lease:
        source, _, nouns = open_inputs(settings)
        before = Manifest.from_json(folder.manifest())
        after = extend(before, source.files(), settings.shard_size, settings.limit, source.rows_digest)
        if after.samples > before.samples:
            check_columns(source, after)
        now = run_info(settings, source, after, nouns)
        unchanged = now["digests"] | {"data": info["digests"]["data"]}
        check_same(info, now | {"digests": unchanged, "fingerprint": settings.fingerprint(**unchanged)}, out)
        settled = _settled(settings, folder, before)
        if unfinished(settings, folder):
            finish(settings, folder, nouns, follow, lease)
        drift = _settle(folder, latest(folder.store))
        new_samples = after.samples - before.samples
        if new_samples:
            begun = begin_refresh(folder.store, {name: now[name] for name in CHANGED}, after.to_json())
            finish(settings, folder, nouns, follow, lease)
            drift = _settle(folder, begun)
    done = outcome(uri, folder, time.perf_counter() - began, since=settled)
    return Refreshed(done, new_samples, drift)


def _settled(settings: CensusSettings, folder: RunFolder, manifest: Manifest) -> int:
    """Return how many shards, the first ones, an earlier call brought to their end and told of."""
    if settings.retry_failed:
        return 0
    if not unfinished(settings, folder):
        return len(manifest.shards)
    number = latest(folder.store).number
    if not number:
        return 0
    earlier = f"{folder_of(number - 1)}/manifest.json" if number > 1 else "manifest.json"
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
