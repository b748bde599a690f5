"""Remove what killed and late workers left in a run's folder, and nothing that anybody may still need."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from mmray.errors import InputError
from mmray.runs.analyses import RunJob, census_of, jobs_of
from mmray.runs.folder import RunFolder, unit_of
from mmray.runs.lease import driving
from mmray.runs.snapshots import open_snapshot, snapshots
from mmray.storage import Entry, Store

GRACE = 3600.0
"""Seconds for which parts of a shard that is not committed are left alone: a worker may be about to commit them."""
PROBES = ".mmray-"
"""How the keys of objects begin that were only to try the store or to read its clock."""


@dataclass(frozen=True)
class Swept:
    """What a sweep has removed, and what it has left because it is too young."""

    objects: int
    bytes: int
    young: int
    left: tuple[str, ...] = ()
    """Why a job was left alone, such as that it is driven."""


def sweep_run(folder: RunFolder, grace: float = GRACE) -> Swept:
    """Sweep a run and each of its analyses; a job that is driven, or whose receipts are damaged, is left alone."""
    swept: list[Swept] = []
    left: list[str] = []
    for job in jobs_of(folder):
        try:
            swept.append(_sweep(job, grace))
        except InputError as error:
            left.append(str(error))
    objects, size, young = (sum(getattr(one, name) for one in swept) for name in ("objects", "bytes", "young"))
    return Swept(objects, size, young, tuple(left))


def sweep(folder: RunFolder, grace: float = GRACE) -> Swept:
    """Remove parts that no receipt names, half-written files, and probes; raises InputError while the run is driven."""
    return _sweep(census_of(folder), grace)


def _sweep(job: RunJob, grace: float) -> Swept:
    with driving(job.lease):
        now = _clock(job.lease)
        young: list[Entry] = []
        removed: list[Entry] = []
        for store, useless, doubtful in [
            *((folder.store, *orphans(folder)) for folder in job.folders),
            (job.tables, [], _unnamed(job.tables, job.feature.name)),
        ]:
            old = [entry for entry in doubtful if entry.modified <= now - grace]
            young += [entry for entry in doubtful if entry.modified > now - grace]
            for entry in useless + old:
                store.delete(entry.key)
            removed += useless + old
    return Swept(len(removed), sum(entry.size for entry in removed), len(young))


def _unnamed(store: Store, job: str) -> list[Entry]:
    """Return the files of tables that no snapshot of a job names: of merges that were killed."""
    files = [entry for entry in store.list(f"snapshots/{job}/") if entry.key.endswith(".parquet")]
    # The snapshots after the files: what is committed in between is seen as named.
    opened = [open_snapshot(store, job, number) for number in snapshots(store, job).get(job, [])]
    named = {file.key for snapshot in opened for table in snapshot.tables.values() for file in table}
    return [entry for entry in files if entry.key not in named]


def orphans(folder: RunFolder) -> tuple[list[Entry], list[Entry]]:
    """Return the objects that nobody can need any more, and those that an unfinished attempt might.

    A shard that is committed stays as its receipt says: other parts of it are of attempts that came too late, and what
    was noted of its attempts, or of why it was given up before, is of no use any more.
    """
    parts = folder.store.list("shards/")
    notes = folder.store.list("attempts/") + folder.store.list("aside/")
    # The receipts after the parts: a shard that is committed in between is seen as committed.
    receipts = folder.receipts()
    named = {key for receipt in receipts.values() for key in (receipt.parts or {}).values()}
    useless: list[Entry] = []
    doubtful = [*folder.store.incomplete_writes(), *folder.store.list(PROBES)]
    for entry in parts:
        if entry.key not in named:
            number = unit_of(entry.key)
            if number is not None:
                (useless if number in receipts else doubtful).append(entry)
    useless += [entry for entry in notes if unit_of(entry.key) in receipts]
    return useless, doubtful


def _clock(store: Store) -> float:
    """Return the time of the store's own clock, by which its objects are dated."""
    key = f"{PROBES}clock-{uuid4().hex}"
    store.put(key, b"")
    entry = store.entry(key)
    store.delete(key)
    assert entry is not None
    return entry.modified
