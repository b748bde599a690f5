"""Commits on a store that can't create if absent: every one is an object of its own name, and a key's first counts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias
from uuid import uuid4

from mmray.storage.objects import Entry, Store

Entries: TypeAlias = list[Entry]

SEPARATOR = "~"
"""Stands in an object's name between the key and what is the commit's own."""


class NamedCommits:
    """A store whose `put` is whole but whose conditions are disregarded, or that lacks them.

    A commit writes `KEY~TIME-RANDOM` and then looks which object of the key is the first by the store's clock. Two
    that are written within the same moment may both be told that they are the first; readers agree on one. That is
    enough for a run: parts of shards are named by their attempt, and equal whoever computed them. What `put` wrote
    under the key itself goes before any commit.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri = inner.uri

    def _first(self, key: str) -> Entry | None:
        named = self.inner.list(f"{key}{SEPARATOR}")
        return self.inner.entry(key) or min(named, key=_age, default=None)

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""
        first = self._first(key)
        return self.inner.read(first.key if first else key)

    def exists(self, key: str) -> bool:
        """Return whether the object is there."""
        return self._first(key) is not None

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry, or None if there is none."""
        first = self._first(key)
        return first and replace(first, key=key)

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`, in order of key."""
        firsts = {key: min(entries, key=_age) for key, entries in self._by_key(prefix).items()}
        return [replace(firsts[key], key=key) for key in sorted(firsts)]

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object under a name of its own; False, and the name removed, if the key has an earlier one."""
        if self.exists(key):
            return False
        name = f"{key}{SEPARATOR}{time.time_ns():020d}-{uuid4().hex[:8]}"
        self.inner.put(name, data)
        first = self._first(key)
        if first is not None and first.key != name:
            self.inner.delete(name)
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object, whole or not at all."""
        self.inner.put(key, data)

    def delete(self, key: str) -> None:
        """Remove the object if it is there, with all that was committed under its key."""
        for entry in self.inner.list(f"{key}{SEPARATOR}"):
            self.inner.delete(entry.key)
        self.inner.delete(key)

    def leftovers(self) -> Sequence[Entry]:
        """Return what killed writers left half-written, and commits that were not their key's first."""
        grouped = self._by_key("").values()
        shadowed = [entry for entries in grouped for entry in sorted(entries, key=_age)[1:]]
        return [*self.inner.leftovers(), *shadowed]

    def _by_key(self, prefix: str) -> dict[str, Entries]:
        found: dict[str, Entries] = defaultdict(list)
        for entry in self.inner.list(prefix):
            found[entry.key.partition(SEPARATOR)[0]].append(entry)
        return found


def _age(entry: Entry) -> tuple[bool, float, str]:
    """Order a key's objects: first what was put under the key itself, then the earliest commit."""
    return SEPARATOR in entry.key, entry.modified, entry.key
