"""Commits for a store without create-if-absent: each commit is an object of its own, and a key's oldest one counts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from uuid import uuid4

from mmray.storage.objects import Entry, WrappedStore

SEPARATOR = "~"
"""Separates the key from the commit's own suffix in an object's name."""


class NamedCommits(WrappedStore):
    """A store whose `put` is atomic, but which ignores or lacks conditional writes.

    A commit writes `KEY~TIME-RANDOM`, then checks which object of the key is the oldest by the store's clock. Two
    commits at the same moment may both be told that they won, but all readers agree on one. That is enough for a run:
    parts are named by their attempt, and equal whoever computed them. What `put` wrote under the key itself takes
    precedence over any commit.
    """

    def _winner(self, key: str) -> Entry | None:
        commits = self.inner.list(f"{key}{SEPARATOR}")
        return self.inner.entry(key) or min(commits, key=_precedence, default=None)

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""
        winner = self._winner(key)
        return self.inner.read(winner.key if winner else key)

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        return self._winner(key) is not None

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry, or None if there is none."""
        winner = self._winner(key)
        return winner and replace(winner, key=key)

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`, in order of key."""
        by_key = _by_key(self.inner.list(prefix))
        return [replace(min(by_key[key], key=_precedence), key=key) for key in sorted(by_key)]

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object under a name of its own; False, with that name removed, if the key has an older one."""
        if self.exists(key):
            return False
        # The random part tells apart commits of the same nanosecond.
        name = f"{key}{SEPARATOR}{time.time_ns():020d}-{uuid4().hex[:8]}"
        self.inner.put(name, data)
        # Decided by the store's clock, not by the time in the name: clocks of machines differ.
        winner = self._winner(key)
        if winner is not None and winner.key != name:
            self.inner.delete(name)
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove the object, with every commit of its key."""
        # The commits first: if this is interrupted, no older commit takes the place of what was put.
        for entry in self.inner.list(f"{key}{SEPARATOR}"):
            self.inner.delete(entry.key)
        self.inner.delete(key)

    def incomplete_writes(self) -> Sequence[Entry]:
        """Return what killed writers left half-written, and commits that lost to an older one."""
        groups = _by_key(self.inner.list()).values()
        shadowed = [entry for entries in groups for entry in sorted(entries, key=_precedence)[1:]]
        return [*self.inner.incomplete_writes(), *shadowed]


def _by_key(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.key.partition(SEPARATOR)[0]].append(entry)
    return groups


def _precedence(entry: Entry) -> tuple[bool, float, str]:
    """Sort a key's objects: first what was put under the key itself, then the oldest commit."""
    return SEPARATOR in entry.key, entry.modified, entry.key
