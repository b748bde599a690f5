"""What a run's data had gained, one numbered refresh after the other, each written once.

refreshes/000001/before/rankings.parquet   tables as they were before it
refreshes/000001/manifest.json             all shards: the earlier ones as they were, then those of the new data
refreshes/000001/run.json                  what it changes in run.json; with this the refresh has begun
refreshes/000001/drift.json                what it has changed in the rankings; with this it has ended
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mmray.storage import Store

BEFORE = ("rankings", "neurons")
"""Tables that are kept as they were, for the comparison."""


@dataclass(frozen=True)
class Refresh:
    """One refresh; number 0 is the run as it began."""

    number: int = 0
    manifest: str = "manifest.json"
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where its objects lie."""
        return folder_of(self.number)


def folder_of(number: int) -> str:
    """Return where the objects of a refresh lie."""
    return f"refreshes/{number:06d}"


def latest(store: Store) -> Refresh:
    """Return the last refresh that has begun."""
    begun = [entry.key for entry in store.list("refreshes/") if entry.key.endswith("/run.json")]
    if not begun:
        return Refresh()
    number = int(begun[-1].split("/")[1])
    return Refresh(number, f"{folder_of(number)}/manifest.json", json.loads(store.read(begun[-1])))


def begin_refresh(store: Store, info: dict[str, Any], manifest: bytes) -> Refresh:
    """Keep the tables as they are and add new shards to the run; the run goes on from where it was if this is stopped.

    Only who holds the run's lease may call this.
    """
    number = latest(store).number + 1
    folder = folder_of(number)
    for entry in store.list("tables/"):
        if entry.key.split("/")[1].removesuffix(".parquet") in BEFORE:
            store.put(f"{folder}/before/{entry.key.removeprefix('tables/')}", store.read(entry.key))
    store.put(f"{folder}/manifest.json", manifest)
    store.commit(f"{folder}/run.json", json.dumps(info, indent=1, sort_keys=True).encode())
    return latest(store)
