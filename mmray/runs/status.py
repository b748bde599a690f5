"""Progress of each analysis of a run, its driver, and whether its tables are up to date with parts and census."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mmray.errors import DamagedError, InputError, StorageError
from mmray.features import FEATURES
from mmray.runs import Receipt
from mmray.runs.analyses import Analysis, find_analyses
from mmray.runs.failures import Reason, committed_failures, reasons
from mmray.runs.folder import RunFolder
from mmray.runs.lease import Driver, last_driver
from mmray.runs.receipts import NO_COST, Cost, cost, receipts_digest, skipped
from mmray.runs.run import Run
from mmray.runs.snapshots import Snapshot, newest

READERS = 8
"""Analyses that are read in parallel."""

Tables = Literal["", "current", "not made", "older than the parts", "older than the census", "of other settings"]
"""State of an analysis's tables; empty for one without tables that is as new as the census."""
STALE: tuple[Tables, ...] = ("older than the parts", "older than the census")


@dataclass(frozen=True)
class AnalysisStatus:
    """Progress of an analysis, and the state of its tables."""

    name: str
    title: str
    folder: str
    """Relative to the run."""
    noun: str
    """What `size` counts."""
    units: int
    units_done: int
    size: int
    size_done: int
    tables: Tables
    renew: str
    """The command that resumes it or makes its tables again."""
    driver: Driver | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings that it was called with."""
    quarantined: dict[int, str] = field(default_factory=dict)
    failures: int = 0
    reasons: tuple[Reason, ...] = ()
    """Why samples failed, the most frequent first."""
    skipped: dict[str, int] = field(default_factory=dict)
    cost: Cost = NO_COST
    damage: tuple[str, ...] = ()
    """Problems with its files, one line each."""

    @property
    def pending(self) -> int:
        """Units neither done nor quarantined."""
        return self.units - self.units_done - len(self.quarantined)

    @property
    def rate(self) -> float:
        """Processed size per second of worker time."""
        return self.size_done / self.cost.seconds if self.cost.seconds else 0.0

    @property
    def at_work(self) -> bool:
        """Whether a driver is alive."""
        return self.driver is not None and self.driver.state == "at work"

    @property
    def at_rest(self) -> bool:
        """Whether it is complete and undamaged, and only superseded by a later one with other settings."""
        return self.tables == "of other settings" and not (self.pending or self.quarantined or self.damage)

    def summary(self) -> dict[str, Any]:
        """Return its entry in the output of --json."""
        return asdict(self) | {"pending": self.pending, "rate": self.rate}


def analyses(folder: RunFolder, run: Run | None) -> list[AnalysisStatus]:
    """Return the status of each analysis in a folder; `run` is None for the folder of an edit, or OUT of a job."""
    census = run.digests()["receipts"] if run is not None and run.snapshot else ""
    found = find_analyses(folder.store)
    # The latest of each kind comes first. Only its tables are current; earlier ones had other settings.
    latest: dict[tuple[str, str, str], Analysis] = {}
    for analysis in found:
        latest.setdefault((analysis.target, analysis.feature.name, analysis.step), analysis)
    with ThreadPoolExecutor(READERS) as pool:
        statuses = list(pool.map(lambda one: _status(one, census, is_last=one in latest.values()), found))
    parts = {feature.name for feature in FEATURES.values() if feature.part_of}
    shown = [one for one in statuses if one.name not in parts or one.pending or one.quarantined or one.damage]
    return shown if run is None else [*shown, *_pipeline(folder, census)]


def _status(analysis: Analysis, census: str, *, is_last: bool) -> AnalysisStatus:
    folder, damage = analysis.folder(), []
    info: Mapping[str, Any] = {}
    done: dict[int, Receipt] = {}
    quarantined: dict[int, Receipt] = {}
    sizes: list[int] = []
    snapshot = None
    why: list[Reason] = []
    try:
        info = folder.info() or {}
        done, quarantined, wrong = folder.readable_receipts()
        damage += [str(error) for error in wrong]
        sizes = _sizes(folder)
        snapshot = newest(analysis.tables(), analysis.feature.name)
        why = reasons(committed_failures(folder, done.values()))
    except StorageError:
        raise
    except InputError as error:
        # Damage is part of the status; only storage that can't be read at all ends the command.
        damage.append(str(error))
    # With a damaged manifest, what is there is the least that there can be.
    units = len(sizes) or len(done) + len(quarantined)
    receipts = [*done.values(), *quarantined.values()]
    size_done = sum(receipt.samples for receipt in receipts)
    finished = bool(info) and len(done) + len(quarantined) >= units
    return AnalysisStatus(
        name=analysis.feature.name,
        title=analysis.title,
        folder=analysis.key,
        noun=analysis.feature.noun,
        units=units,
        units_done=len(done),
        quarantined={number: receipt.reason or "" for number, receipt in quarantined.items()},
        size=max(sum(sizes), size_done),
        size_done=size_done,
        failures=sum(receipt.failures for receipt in done.values()),
        reasons=tuple(why),
        skipped=skipped(done.values()),
        cost=cost(done.values()),
        tables=_tables(analysis, info, snapshot, done, census, finished=finished, is_last=is_last),
        renew=analysis.command,
        settings=info.get("settings", {}),
        driver=last_driver(analysis.lease()),
        damage=tuple(damage),
    )


def _sizes(folder: RunFolder) -> list[int]:
    """Return the sizes of an analysis's units; raises DamagedError if the manifest is damaged or missing."""
    try:
        return [int(size) for size in json.loads(folder.manifest())["sizes"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder.store.uri}/manifest.json: damaged or gone; the same command makes it") from error


def _pipeline(run: RunFolder, census: str) -> Iterator[AnalysisStatus]:
    """Yield the state of the tables that a pipeline makes of a run's edits, if it has made any; it has no units."""
    feature, made_from, damage = FEATURES["pipeline"], dict[str, str](), ""
    try:
        snapshot = newest(run.store, feature.name)
        if snapshot is None or not snapshot.made_from:
            # Earlier versions did not record what the tables were made from.
            return
        made_from |= snapshot.made_from
    except DamagedError as error:
        damage = str(error)
    with ThreadPoolExecutor(READERS) as pool:
        states = set(pool.map(lambda key: _state_of_parts(run, key, made_from[key], census), made_from))
    edits = len({key.split("/")[1] for key in made_from})
    yield AnalysisStatus(
        name=feature.name,
        title=feature.name,
        folder="",
        noun=feature.noun,
        units=edits,
        units_done=edits,
        size=edits,
        size_done=edits,
        tables="not made" if damage else next((state for state in STALE if state in states), "current"),
        renew=feature.command,
        driver=last_driver(RunFolder.at(f"{run.store.uri}/{feature.name}").store),
        damage=(damage,) if damage else (),
    )


def _state_of_parts(run: RunFolder, key: str, digest: str, census: str) -> Tables:
    """Return the state of tables made from parts in a folder of the run, whose receipts had this digest then."""
    folder = RunFolder.at(f"{run.store.uri}/{key}")
    try:
        info, (done, *_) = folder.info() or {}, folder.readable_receipts()
    except StorageError:
        raise
    except InputError:
        # The status of that folder's own analysis names the damage.
        return "older than the parts"
    if receipts_digest(done) != digest:
        return "older than the parts"
    begun_on = info.get("digests", {}).get("receipts", census)
    return "older than the census" if census and begun_on != census else "current"


def _tables(
    analysis: Analysis,
    info: Mapping[str, Any],
    snapshot: Snapshot | None,
    done: Mapping[int, Receipt],
    census: str,
    *,
    finished: bool,
    is_last: bool,
) -> Tables:
    """Return the state of an analysis's tables."""
    outdated: Tables = "older than the census"
    begun_on = info.get("digests", {}).get("receipts", census)
    is_outdated = bool(census) and begun_on != census
    if not analysis.feature.tables:
        if finished and not is_last:
            return "of other settings"
        return outdated if is_outdated else ""
    if snapshot is None:
        return "not made"
    made_from = snapshot.made_from
    if "fingerprint" not in made_from:
        # Several analyses share the tables; `made_from` has the census receipts of each.
        return outdated if census and any(receipts != census for receipts in made_from.values()) else "current"
    if made_from["fingerprint"] != info.get("fingerprint"):
        return "not made" if is_last else "of other settings"
    if made_from.get("receipts") != receipts_digest(done):
        return "older than the parts"
    return outdated if is_outdated else "current"
