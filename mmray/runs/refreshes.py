"""Numbered refreshes of a run, each of which adds the shards of new data; their files are written once.

refreshes/000001/before/rankings.parquet   tables before the refresh
refreshes/000001/manifest.json             all shards: the earlier ones unchanged, then those of the new data
refreshes/000001/run.json                  changes to run.json; marks the refresh as begun
refreshes/000001/drift.json                changes of the rankings; marks the refresh as finished
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mmray.storage import Store

COMPARED_TABLES = ("rankings", "neurons")
"""Tables that are copied first, so that drift compares with them."""


@dataclass(frozen=True)
class Refresh:
    """One refresh; number 0 is the original run."""

    number: int = 0
    manifest: str = "manifest.json"
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Prefix of its objects."""
        return folder_of(self.number)


def folder_of(number: int) -> str:
    """Return the prefix of a refresh's objects."""
    return f"refreshes/{number:06d}"


def latest(store: Store) -> Refresh:
    """Return the last refresh that has begun."""
    begun = [entry.key for entry in store.list("refreshes/") if entry.key.endswith("/run.json")]
    if not begun:
        return Refresh()
    # Listings are sorted, and numbers have leading zeros.
    number = int(begun[-1].split("/")[1])
    return Refresh(number, f"{folder_of(number)}/manifest.json", json.loads(store.read(begun[-1])))


def begin_refresh(store: Store, info: dict[str, Any], manifest: bytes) -> Refresh:
    """Copy the current tables and add new shards to the run. The caller must hold the run's lease."""
    number = latest(store).number + 1
    folder = folder_of(number)
    for entry in store.list("tables/"):
        if entry.key.split("/")[1].removesuffix(".parquet") in COMPARED_TABLES:
            store.put(f"{folder}/before/{entry.key.removeprefix('tables/')}", store.read(entry.key))
    # Replaced if it is there: a refresh that died before its run.json has left files of the same number.
    store.put(f"{folder}/manifest.json", manifest)
    # Last: until this is committed, the run continues without the refresh.
    store.commit(f"{folder}/run.json", json.dumps(info, indent=1, sort_keys=True).encode())
    return latest(store)
