"""Stores that go wrong on purpose, round a real one."""

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

from mmray.errors import StorageError
from mmray.runs import folder
from mmray.storage import Entry, Store, open_store


class Killed(BaseException):
    """What stands for `kill -9` within a test: nothing catches it, and nothing is tidied up."""


class Wrapped:
    """A store that passes everything on; those below change one thing."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri = inner.uri

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def exists(self, key: str) -> bool:
        return self.inner.exists(key)

    def entry(self, key: str) -> Entry | None:
        return self.inner.entry(key)

    def list(self, prefix: str = "") -> list[Entry]:
        return self.inner.list(prefix)

    def commit(self, key: str, data: bytes) -> bool:
        return self.inner.commit(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.inner.put(key, data)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def incomplete_writes(self) -> Sequence[Entry]:
        return self.inner.incomplete_writes()


class Life:
    """Ends before the n-th change to storage, counted from 0, and stays ended."""

    def __init__(self, changes: int) -> None:
        self.left = changes
        self.lock = Lock()

    def live(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                raise Killed


class Mortal(Wrapped):
    """Dies before its n-th change, counted from 0; every later change of the same process dies too."""

    def __init__(self, inner: Store, life: int | Life) -> None:
        super().__init__(inner)
        self.life = Life(life) if isinstance(life, int) else life

    def _live(self) -> None:
        self.life.live()

    def commit(self, key: str, data: bytes) -> bool:
        self._live()
        return self.inner.commit(key, data)

    def put(self, key: str, data: bytes) -> None:
        self._live()
        self.inner.put(key, data)

    def delete(self, key: str) -> None:
        self._live()
        self.inner.delete(key)


class Forgetful(Wrapped):
    """Loses its answers: a commit is carried out, asked for again, and then finds itself."""

    def commit(self, key: str, data: bytes) -> bool:
        self.inner.commit(key, data)
        return self.inner.commit(key, data)


class Unconditional(Wrapped):
    """Disregards the condition of a commit, as an S3 without conditional writes does."""

    def commit(self, key: str, data: bytes) -> bool:
        self.inner.put(key, data)
        return True


class Unwilling(Wrapped):
    """Refuses the condition of a commit, as stores do that have not heard of it."""

    def commit(self, key: str, data: bytes) -> bool:
        raise StorageError(f"{self.uri}: A header you provided implies functionality that is not implemented")


class Meanwhile(Wrapped):
    """Has something else happen before the n-th commit, counted from 0."""

    def __init__(self, inner: Store, commits: int, happen: Callable[[], Any]) -> None:
        super().__init__(inner)
        self.left = commits
        self.happen = happen

    def commit(self, key: str, data: bytes) -> bool:
        if self.left == 0:
            self.happen()
        self.left -= 1
        return self.inner.commit(key, data)


@contextmanager
def dying(changes: int, kind: type[Mortal] = Mortal) -> Iterator[None]:
    """Have this process die before its n-th change to any of the folders that it opens within the block."""
    life = Life(changes)

    def mortal(uri: str | Path) -> Store:
        return kind(open_store(uri), life)

    with patch.object(folder, "open_store", mortal):
        yield


class FullFile(io.BytesIO):
    """A file on a full disk."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")
