"""One door to local folders and S3 prefixes: read, list, commit once.

A *commit* creates a key only if it is absent, and whole or not at all: a reader never sees half an object, and a late
writer can't replace what an earlier one committed. Local files use a temporary file, `fsync` and a hard link; S3 uses a
single conditional `PutObject` (`IfNoneMatch: *`), so the bytes are complete in memory before anything is sent.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import pyarrow.fs as arrow_fs

from mmray.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One stored object: its key below the store's root, its size in bytes, and what changes when its content does."""

    key: str
    size: int
    version: str


class Store(Protocol):
    """A folder of objects named by `/`-separated keys."""

    uri: str

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""

    def exists(self, key: str) -> bool:
        """Tell whether the object is there."""

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


class LocalStore:
    """A folder of the local (or a mounted) file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def _path(self, key: str) -> Path:
        path = self.root / key
        if ".." in Path(key).parts or Path(key).is_absolute():
            raise InputError(f"key {key!r} leaves {self.uri}")
        return path

    def read(self, key: str) -> bytes:
        """Return the whole file; `FileNotFoundError` if there is none."""
        return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        """Tell whether the file is there."""
        return self._path(key).is_file()

    def entry(self, key: str) -> Entry | None:
        """Return the file's entry, or None if there is none."""
        path = self._path(key)
        if not path.is_file():
            return None
        status = path.stat()
        return Entry(key, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every file whose key starts with `prefix`; temporary files are left out."""
        folder = self.root / prefix.rpartition("/")[0]
        entries = []
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent) / name
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(".tmp-"):
                    entries.append(self.entry(key))
        # A file may have gone since it was listed, or be a link to nothing.
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.key)

    def _temporary(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def commit(self, key: str, data: bytes) -> bool:
        """Create the file by linking a complete temporary one to its name; False if the name is taken."""
        path = self._path(key)
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the file by renaming a complete temporary one."""
        path = self._path(key)
        self._temporary(path, data).replace(path)
        _sync_folder(path.parent)

    def delete(self, key: str) -> None:
        """Remove the file if it is there."""
        self._path(key).unlink(missing_ok=True)


class S3Store:
    """A prefix of an S3 bucket; credentials, region and endpoint come from the usual AWS environment and files."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""
        client = s3_client()
        try:
            body: bytes = client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        except client.exceptions.NoSuchKey as error:
            raise FileNotFoundError(f"{self.uri}/{key}") from error
        return body

    def exists(self, key: str) -> bool:
        """Tell whether the object is there."""
        return self.entry(key) is not None

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry by one request, or None if there is none."""
        from botocore.exceptions import ClientError

        try:
            head = s3_client().head_object(Bucket=self.bucket, Key=self.prefix + key)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return Entry(key, head["ContentLength"], head["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`."""
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        entries = [
            Entry(item["Key"].removeprefix(self.prefix), item["Size"], item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", [])
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object by one conditional request; False if it exists."""
        from botocore.exceptions import ClientError

        try:
            s3_client().put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                return False
            raise
        return True

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object in one request."""
        s3_client().put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        s3_client().delete_object(Bucket=self.bucket, Key=self.prefix + key)


@cache
def s3_client() -> Any:
    """Return this process's S3 client, with retries for throttling and outages of some seconds."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": 10}))


def open_store(uri: str | Path) -> Store:
    """Return the store behind a local path or `s3://bucket/prefix`; raises `InputError` for another scheme."""
    address = urlparse(str(uri))
    if address.scheme == "s3":
        if not address.netloc:
            raise InputError(f"{uri}: no bucket; write s3://BUCKET/PREFIX")
        return S3Store(address.netloc, address.path.strip("/"))
    if "://" in str(uri):
        raise InputError(f"{uri}: scheme {address.scheme!r} is not supported; use a local path or s3://bucket/prefix")
    return LocalStore(Path(uri).expanduser().resolve())


def filesystem(uri: str | Path) -> tuple[arrow_fs.FileSystem, str]:
    """Return pyarrow's file system and the path on it, for random-access reads of large files."""
    address = urlparse(str(uri))
    if address.scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict[str, Any] = {"region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
        if endpoint:
            parsed = urlparse(endpoint)
            options |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme}
        return arrow_fs.S3FileSystem(**options), f"{address.netloc}{address.path}"
    return arrow_fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())


def check_writable(store: Store) -> None:
    """Write and remove a small object, so that a missing permission or a full disk is told before any work.

    Raises `InputError` naming the place and the cause.
    """
    key = f".mmray-check-{uuid.uuid4().hex}"
    try:
        store.put(key, b"mmray")
        store.delete(key)
    except Exception as error:
        raise InputError(
            f"{store.uri}: can't write here ({error}); choose another OUT or mend its permissions"
        ) from error


def _sync_folder(folder: Path) -> None:
    # The new name itself is durable only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
