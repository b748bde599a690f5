"""Sweep a run: remove what killed and late workers left behind, and nothing that may still be needed."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from mmray.errors import InputError
from mmray.runs.analyses import RunJob, census_of, jobs_of
from mmray.runs.folder import RunFolder
from mmray.runs.lease import hold_lease
from mmray.runs.receipts import unit_of
from mmray.runs.snapshots import open_snapshot, snapshots
from mmray.storage import Entry, Store

GRACE = 3600.0
"""Seconds before parts of an uncommitted shard are removed: a worker may be about to commit them."""
PROBES = ".mmray-"
"""Prefix of objects that were written only to test the store or to read its clock."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep removed."""

    objects: int
    bytes: int
    young: int
    """Objects kept because they are too recent."""
    left: tuple[str, ...] = ()
    """Why jobs were skipped, such as that a driver is at work."""


def sweep_run(folder: RunFolder, grace: float = GRACE) -> SweepResult:
    """Sweep a run and each of its analyses; jobs with a live driver or damaged receipts are skipped."""
    results: list[SweepResult] = []
    left: list[str] = []
    for job in jobs_of(folder):
        try:
            results.append(_sweep(job, grace))
        except InputError as error:
            left.append(str(error))
    objects, size, young = (sum(getattr(one, name) for one in results) for name in ("objects", "bytes", "young"))
    return SweepResult(objects, size, young, tuple(left))


def sweep(folder: RunFolder, grace: float = GRACE) -> SweepResult:
    """Sweep the census alone; raises InputError while it has a driver."""
    return _sweep(census_of(folder), grace)


def _sweep(job: RunJob, grace: float) -> SweepResult:
    # With the lease, no driver starts during the sweep. Workers of a dead driver may still be running.
    with hold_lease(job.lease):
        now = _clock(job.lease)
        young: list[Entry] = []
        removed: list[Entry] = []
        for store, unused, maybe_unused in [
            *((folder.store, *_unused_objects(folder)) for folder in job.folders),
            (job.tables, [], _unnamed_files(job.tables, job.feature.name)),
        ]:
            old = [entry for entry in maybe_unused if entry.modified <= now - grace]
            young += [entry for entry in maybe_unused if entry.modified > now - grace]
            for entry in unused + old:
                store.delete(entry.key)
            removed += unused + old
    return SweepResult(len(removed), sum(entry.size for entry in removed), len(young))


def _unnamed_files(store: Store, job: str) -> list[Entry]:
    """Return table files that no snapshot of a job names, left by killed merges."""
    files = [entry for entry in store.list(f"snapshots/{job}/") if entry.key.endswith(".parquet")]
    # Snapshots are read after the files: a merge that commits in between has its files counted as named.
    opened = [open_snapshot(store, job, number) for number in snapshots(store, job).get(job, [])]
    named = {file.key for snapshot in opened for table in snapshot.tables.values() for file in table}
    return [entry for entry in files if entry.key not in named]


def _unused_objects(folder: RunFolder) -> tuple[list[Entry], list[Entry]]:
    """Return the objects that nobody needs any more, and those that an unfinished attempt may still need."""
    parts = folder.store.list("shards/")
    records = folder.store.list("attempts/") + folder.store.list("aside/")
    # Receipts are read after the parts: a shard that is committed in between counts as committed.
    receipts = folder.receipts()
    named = {key for receipt in receipts.values() for key in (receipt.parts or {}).values()}
    # A committed shard stays as its receipt says: its other parts, attempts and quarantine are unused for good.
    unused = [entry for entry in records if unit_of(entry.key) in receipts]
    maybe_unused = [*folder.store.incomplete_writes(), *folder.store.list(PROBES)]
    for entry in parts:
        if entry.key not in named:
            number = unit_of(entry.key)
            if number is not None:
                (unused if number in receipts else maybe_unused).append(entry)
    return unused, maybe_unused


def _clock(store: Store) -> float:
    """Return the time by the store's own clock, which dates its objects and may differ from ours."""
    key = f"{PROBES}clock-{uuid4().hex}"
    store.put(key, b"")
    entry = store.entry(key)
    store.delete(key)
    assert entry is not None
    return entry.modified
