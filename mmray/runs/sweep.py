"""Remove what killed and late workers left in a run's folder, and nothing that anybody may still need."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from mmray.runs.folder import RunFolder, unit_of
from mmray.runs.lease import driving
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


def sweep(folder: RunFolder, grace: float = GRACE) -> Swept:
    """Remove parts that no receipt names, half-written files, and probes; raises InputError while the run is driven."""
    with driving(folder.store):
        now = _clock(folder.store)
        useless, doubtful = orphans(folder)
        young = [entry for entry in doubtful if entry.modified > now - grace]
        removed = useless + [entry for entry in doubtful if entry.modified <= now - grace]
        for entry in removed:
            folder.store.delete(entry.key)
    return Swept(len(removed), sum(entry.size for entry in removed), len(young))


def orphans(folder: RunFolder) -> tuple[list[Entry], list[Entry]]:
    """Return the objects that nobody can need any more, and those that an unfinished attempt might.

    A shard that is committed stays as its receipt says: other parts of it are of attempts that came too late.
    """
    parts = folder.store.list("shards/")
    # The receipts after the parts: a shard that is committed in between is seen as committed.
    receipts = folder.receipts()
    named = {key for receipt in receipts.values() for key in (receipt.parts or {}).values()}
    useless: list[Entry] = []
    doubtful = [*folder.store.leftovers(), *folder.store.list(PROBES)]
    for entry in parts:
        if entry.key not in named:
            number = unit_of(entry.key)
            if number is not None:
                (useless if number in receipts else doubtful).append(entry)
    return useless, doubtful


def _clock(store: Store) -> float:
    """Return the time of the store's own clock, by which its objects are dated."""
    key = f"{PROBES}clock-{uuid4().hex}"
    store.put(key, b"")
    entry = store.entry(key)
    store.delete(key)
    assert entry is not None
    return entry.modified
