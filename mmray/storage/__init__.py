"""One door to local folders and S3 prefixes: read, list, commit once.

A *commit* creates a key only if it is absent, and atomically: a reader never sees half an object, and a late writer
can't replace what an earlier one committed. The bytes are complete in memory before anything is written.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import pyarrow.fs as arrow_fs

from mmray.errors import InputError, StorageError
from mmray.storage.local import LocalStore, read_file
from mmray.storage.named import NamedCommits
from mmray.storage.objects import Checksum, Entry, Store, WrappedStore, too_large
from mmray.storage.retries import FULL, RetryingStore, is_full, is_outage, with_retries, without_retries
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
    "WrappedStore",
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
    """Return the store at a local path or `s3://bucket/prefix`; raises `InputError` for another scheme."""
    if not str(uri).strip():
        # Probably an unset shell variable: writing to the current folder instead would surprise the user.
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
    """Return whether a location is the folder itself or inside it; both are the `uri` of a store."""
    return uri == folder or uri.startswith(f"{folder.rstrip('/')}/")


def open_object(uri: str | Path) -> tuple[Store, str]:
    """Return the store of an object's folder, and the object's key in it."""
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
    """Return whether the store supports create-if-absent, by committing a small object twice and then removing it.

    False for a file system without hard links, and for an S3 that rejects or ignores conditions; use `NamedCommits`
    there. Raises `InputError`, before any work, if nothing can be written at all: no permission, a full disk.
    """
    key = f".mmray-check-{uuid.uuid4().hex}"
    try:
        try:
            # The result of the first commit is ignored: if its response was lost, the retried request finds its own
            # object and reports a conflict.
            store.commit(key, b"mmray")
            return not store.commit(key, b"later") and store.read(key) == b"mmray"
        except (OSError, StorageError):
            # Perhaps only the condition was rejected. If a plain write fails, too, its error is the one to report.
            store.put(key, b"mmray")
            return False
        finally:
            store.delete(key)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{store.uri}: can't write here ({reason}); choose another OUT or fix it") from error
