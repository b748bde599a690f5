"""Stores whose changes are disturbed: killed at one, refused, forgotten, or with something else happening before it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol
from unittest.mock import patch

from mmray.errors import OutageError
from mmray.runs import folder
from mmray.storage import Store, open_store
from tests.support.stores import Killed, Wrapped


@dataclass(frozen=True)
class Change:
    """One change that a driver or a worker is about to make to storage."""

    kind: str
    uri: str
    key: str
    make: Callable[[], Any]


class Around(Protocol):
    """What happens instead of a change; by default it is made."""

    def __call__(self, change: Change) -> Any:
        """Return what the change returns."""


class Disturbed(Wrapped):
    """A store each of whose changes is handed to somebody who may make it."""

    def __init__(self, inner: Store, around: Callable[[Change], Any]) -> None:
        super().__init__(inner)
        self.around = around

    def commit(self, key: str, data: bytes) -> bool:
        return bool(self.around(Change("commit", self.uri, key, lambda: self.inner.commit(key, data))))

    def put(self, key: str, data: bytes) -> None:
        self.around(Change("put", self.uri, key, lambda: self.inner.put(key, data)))

    def delete(self, key: str) -> None:
        self.around(Change("delete", self.uri, key, lambda: self.inner.delete(key)))


@contextmanager
def disturbed(around: Callable[[Change], Any]) -> Iterator[None]:
    """Disturb every store that drivers, leases and workers of this process open within the block."""
    with patch.object(folder, "open_store", lambda uri: Disturbed(open_store(uri), around)):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Open stores as they are, within a block of `disturbed`."""
    with patch.object(folder, "open_store", open_store):
        yield


@dataclass
class Counted:
    """Counts changes, and does something at the n-th, counted from 0."""

    at: int = -1
    made: int = 0
    lock: Any = field(default_factory=Lock)

    def __call__(self, change: Change) -> Any:
        with self.lock:
            number, self.made = self.made, self.made + 1
        return self.disturb(number, change)

    def disturb(self, number: int, change: Change) -> Any:
        """Make the change."""
        return change.make()


class Dies(Counted):
    """Dies before the n-th change; every later change of the same process dies too."""

    def disturb(self, number: int, change: Change) -> Any:
        if number >= self.at:
            raise Killed
        return change.make()


class Full(Counted):
    """Has no room from the n-th change on; what is removed is removed."""

    def disturb(self, number: int, change: Change) -> Any:
        if number >= self.at and change.kind != "delete":
            raise OSError(errno.ENOSPC, "No space left on device")
        return change.make()


class ReadOnly(Counted):
    """Refuses all changes."""

    def disturb(self, number: int, change: Change) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")


class LosesAnswer(Counted):
    """Makes the n-th change, and says that storage did not answer; a repeated one is made once more."""

    def disturb(self, number: int, change: Change) -> Any:
        made = change.make()
        if number == self.at:
            raise OutageError(f"{change.uri}: no answer")
        return made


class Forgets(Counted):
    """Makes every change twice and answers for the second: the first answer was lost, and a client asked again."""

    def disturb(self, number: int, change: Change) -> Any:
        change.make()
        return change.make()


@dataclass
class Meanwhile(Counted):
    """Has something else happen before the n-th change, and keeps what is changed afterwards."""

    happen: Callable[[], Any] = lambda: None
    later: list[Change] = field(default_factory=list)

    def disturb(self, number: int, change: Change) -> Any:
        if number == self.at:
            with undisturbed():
                self.happen()
        if number >= self.at >= 0:
            self.later.append(change)
        return change.make()


@dataclass
class Always(Counted):
    """Has something else happen before every change."""

    happen: Callable[[], Any] = lambda: None

    def disturb(self, number: int, change: Change) -> Any:
        self.happen()
        return change.make()
