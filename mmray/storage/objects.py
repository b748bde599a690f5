"""The interface of a store: objects under keys, read, listed and committed once, with checksums of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

from mmray.errors import DamagedError, InputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    key: str
    """Relative to the store's root."""
    size: int
    """In bytes."""
    version: str
    """Changes whenever the content does."""
    modified: float
    """Seconds since 1970 by the store's clock, which may differ from ours."""


class Store(Protocol):
    """A folder of objects named by `/`-separated keys."""

    uri: str

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry, or None if there is none."""

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`, in order of key."""

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object; False, with nothing changed, if it already exists."""

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object, whole or not at all."""

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""

    def incomplete_writes(self) -> Sequence[Entry]:
        """Return what killed writers left half-written; no other method shows it, and `delete` removes it."""


class WrappedStore:
    """A store that passes calls on to another one, through `request`; the base of stores that add something."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri = inner.uri

    def request(self, call: Callable[[], Result]) -> Result:
        """Make one call; subclasses add to it."""
        return call()

    def read(self, key: str) -> bytes:
        """See `Store.read`."""
        return self.request(lambda: self.inner.read(key))

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        return self.request(lambda: self.inner.exists(key))

    def entry(self, key: str) -> Entry | None:
        """See `Store.entry`."""
        return self.request(lambda: self.inner.entry(key))

    def list(self, prefix: str = "") -> list[Entry]:
        """See `Store.list`."""
        return self.request(lambda: self.inner.list(prefix))

    def commit(self, key: str, data: bytes) -> bool:
        """See `Store.commit`."""
        return self.request(lambda: self.inner.commit(key, data))

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`."""
        self.request(lambda: self.inner.put(key, data))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self.request(lambda: self.inner.delete(key))

    def incomplete_writes(self) -> Sequence[Entry]:
        """See `Store.incomplete_writes`."""
        return self.request(self.inner.incomplete_writes)


@dataclass(frozen=True)
class Checksum:
    """Size and SHA-256 of an object when it was written; reveals truncated, changed or swapped objects."""

    size: int
    sha256: str
    rows: int | None = None
    """Of a table."""

    def __post_init__(self) -> None:
        # Built from JSON files, which anyone may have edited.
        if not isinstance(self.size, int) or not isinstance(self.sha256, str):
            raise TypeError(f"not a checksum: {self.size!r}, {self.sha256!r}")

    @classmethod
    def of(cls, data: bytes, rows: int | None = None) -> Checksum:
        """Return the checksum of these bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), rows)

    def check(self, data: bytes) -> None:
        """Raise DamagedError unless these are the bytes that were written."""
        # The size first: it names a truncated object, and costs nothing.
        self.check_size(len(data))
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DamagedError("changed since it was written (another SHA-256)")

    def check_size(self, size: int) -> None:
        """Raise DamagedError unless the object was written with this size."""
        if size != self.size:
            raise DamagedError(f"{size:,} bytes instead of {self.size:,}")


def check_key(key: str, uri: str) -> None:
    """Raise InputError for a key that points outside its store."""
    path = PurePosixPath(key)
    if ".." in path.parts or path.is_absolute():
        raise InputError(f"key {key!r} leaves {uri}")


def too_large(size: int, most: int) -> str:
    """Return the message that refuses an object of this size."""
    return f"{size:,} bytes, more than {most:,}"
