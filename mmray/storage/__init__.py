"""One door to local folders and S3 prefixes: read, list, commit once.

A *commit* creates a key only if it is absent, and whole or not at all: a reader never sees half an object, and a late
writer can't replace what an earlier one committed. The bytes are complete in memory before anything is written.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow.fs as arrow_fs

from mmray.errors import InputError
from mmray.storage.local import LocalStore
from mmray.storage.objects import Entry, Store
from mmray.storage.s3 import S3Store, s3_address, s3_client

__all__ = [
    "Entry",
    "LocalStore",
    "S3Store",
    "Store",
    "check_writable",
    "filesystem",
    "open_object",
    "open_store",
    "s3_client",
]


def open_store(uri: str | Path) -> Store:
    """Return the store behind a local path or `s3://bucket/prefix`; raises `InputError` for another scheme."""
    if (address := s3_address(uri)) is not None:
        bucket, path = address
        return S3Store(bucket, path.strip("/"))
    if "://" in str(uri):
        scheme = str(uri).partition("://")[0]
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; use a local path or s3://bucket/prefix")
    return LocalStore(Path(uri).expanduser().resolve())


def open_object(uri: str | Path) -> tuple[Store, str]:
    """Return the store of the folder that an object lies in, and the object's key there."""
    folder, _, name = str(uri).rstrip("/").rpartition("/")
    return open_store(folder or ("/" if str(uri).startswith("/") else ".")), name


def filesystem(uri: str | Path) -> tuple[arrow_fs.FileSystem, str]:
    """Return pyarrow's file system and the path on it, for random-access reads of large files."""
    if (address := s3_address(uri)) is not None:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict[str, Any] = {"region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
        if endpoint:
            parsed = urlparse(endpoint)
            options |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme}
        return arrow_fs.S3FileSystem(**options), "/".join(address)
    return arrow_fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())


def check_writable(store: Store) -> None:
    """Commit and remove a small object, so that what is wrong with the store is told before any work.

    Raises `InputError` naming the place and the cause: no permission, a full disk, no hard links, or an S3 that
    disregards conditions, on which a late worker could replace what was committed.
    """
    key = f".mmray-check-{uuid.uuid4().hex}"
    try:
        kept = store.commit(key, b"mmray") and not store.commit(key, b"later")
        store.delete(key)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{store.uri}: can't write here ({reason}); choose another OUT or mend it") from error
    if not kept:
        raise InputError(f"{store.uri}: a second write replaces the first (no If-None-Match); choose another OUT")
