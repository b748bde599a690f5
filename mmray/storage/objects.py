"""What a store offers: objects named by keys, read, listed, and committed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from mmray.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One stored object: its key below the store's root, its size in bytes, what changes when its content does, and
    when it was written, in seconds since 1970 by the store's clock.
    """

    key: str
    size: int
    version: str
    modified: float


class Store(Protocol):
    """A folder of objects named by `/`-separated keys."""

    uri: str

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""

    def exists(self, key: str) -> bool:
        """Return whether the object is there."""

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry, or None if there is none."""

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`, in order of key."""

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object; False, and nothing changed, if it already exists."""

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object, whole or not at all."""

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""

    def leftovers(self) -> Sequence[Entry]:
        """Return what killed writers left half-written; no other method shows it, and `delete` removes it."""


def check_key(key: str, uri: str) -> None:
    """Raise InputError for a key that leaves its store."""
    path = PurePosixPath(key)
    if ".." in path.parts or path.is_absolute():
        raise InputError(f"key {key!r} leaves {uri}")


def too_large(size: int, most: int) -> str:
    """Return why so many bytes are refused."""
    return f"{size:,} bytes, more than {most:,}"
