"""One door to local folders and S3 prefixes: read, list, commit once.

A *commit* creates a key only if it is absent, and whole or not at all: a reader never sees half an object, and a late
writer can't replace what an earlier one committed. The bytes are complete in memory before anything is written.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import pyarrow.fs as arrow_fs

from mmray.errors import InputError, StorageError
from mmray.storage.checksum import Checksum
from mmray.storage.local import LocalStore, read_file
from mmray.storage.named import NamedCommits
from mmray.storage.objects import Entry, Store, too_large
from mmray.storage.patience import FULL, RetryingStore, is_full, is_outage, with_retries
from mmray.storage.s3 import S3Store
from mmray.storage.s3_access import arrow_options, masked, s3_address, s3_client

__all__ = [
    "FULL",
    "Checksum",
    "Entry",
    "LocalStore",
    "NamedCommits",
    "RetryingStore",
    "S3Store",
    "Store",
    "commits_once",
    "filesystem",
    "is_full",
    "is_outage",
    "lies_in",
    "masked",
    "open_object",
    "open_store",
    "read_file",
    "s3_client",
    "too_large",
    "with_retries",
    "without_retries",
]


def open_store(uri: str | Path) -> LocalStore | S3Store:
    """Return the store behind a local path or `s3://bucket/prefix`; raises `InputError` for another scheme."""
    if not str(uri).strip():
        # An unset variable of a shell; the current folder would be a surprise.
        raise InputError("an empty path; give a folder, or s3://bucket/prefix")
    if (address := s3_address(uri)) is not None:
        bucket, path = address
        return S3Store(bucket, path.strip("/"))
    if "://" in str(uri):
        scheme = str(uri).partition("://")[0]
        raise InputError(
            f"{masked(str(uri))}: scheme {scheme!r} is not supported; use a local path or s3://bucket/prefix"
        )
    return LocalStore(Path(uri).expanduser().resolve())


def lies_in(uri: str, folder: str) -> bool:
    """Return whether a place is a folder or lies below it; both as the `uri` of a store."""
    return uri == folder or uri.startswith(f"{folder.rstrip('/')}/")


def without_retries(store: Store) -> Store:
    """Return the same store without its patience: every request is made once."""
    match store:
        case RetryingStore():
            return store.inner
        case NamedCommits():
            return NamedCommits(without_retries(store.inner))
    return store


def open_object(uri: str | Path) -> tuple[Store, str]:
    """Return the store of the folder that an object lies in, and the object's key there."""
    folder, _, name = str(uri).rstrip("/").rpartition("/")
    return open_store(folder or ("/" if str(uri).startswith("/") else ".")), name


def filesystem(uri: str | Path) -> tuple[arrow_fs.FileSystem, str]:
    """Return pyarrow's file system and the path on it, for random-access reads of large files."""
    if (address := s3_address(uri)) is not None:
        try:
            return arrow_fs.S3FileSystem(**arrow_options()), "/".join(address)
        except StorageError as error:
            raise StorageError(f"{uri}: {error}") from error
    return arrow_fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())


def commits_once(store: Store) -> bool:
    """Return whether the store keeps what was committed first, by committing twice a small object that is then removed.

    False for a file system without hard links, and for an S3 that refuses or disregards conditions: `NamedCommits`
    serves there. Raises `InputError`, before any work, where nothing can be written at all: no permission, a full disk.
    """
    key = f".mmray-check-{uuid.uuid4().hex}"
    try:
        try:
            # The first answer may be lost, and then the repeated request finds its own object: the key is new.
            store.commit(key, b"mmray")
            return not store.commit(key, b"later") and store.read(key) == b"mmray"
        except (OSError, StorageError):
            # Perhaps it is the condition that is refused: what is wrong with a plain write is raised.
            store.put(key, b"mmray")
            return False
        finally:
            store.delete(key)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{store.uri}: can't write here ({reason}); choose another OUT or fix it") from error
