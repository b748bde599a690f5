"""One door to local folders and S3 prefixes: read, list, commit once.

A *commit* creates a key only if it is absent, and whole or not at all: a reader never sees half an object, and a late
writer can't replace what an earlier one committed. Local files use a temporary file, `fsync` and a hard link; S3 uses a
single conditional `PutObject` (`IfNoneMatch: *`), so the bytes are complete in memory before anything is sent.
"""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlparse

import pyarrow.fs as arrow_fs

from mmray.errors import InputError, StorageError

HOW_TO_MEND = {
    "NoSuchBucket": "create the bucket or check its name",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "renew the credentials",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the bucket's region",
}
"""Code of an S3 error → what the user can do; any other asks for the right to list, read and write."""
CONFLICTS = 10
"""Times that a conditional request is made while S3 answers that another one on the same key is under way (409)."""


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
        _check_key(key, self.uri)
        return self.root / key

    def read(self, key: str) -> bytes:
        """Return the whole file; `FileNotFoundError` if there is none."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(path) from error

    def exists(self, key: str) -> bool:
        """Tell whether the file is there."""
        return self._path(key).is_file()

    def entry(self, key: str) -> Entry | None:
        """Return the file's entry, or None if there is none."""
        try:
            status = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(key, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every file whose key starts with `prefix`; temporary files are left out."""
        folder = self._path(prefix.rpartition("/")[0])
        entries = []
        for parent, _, names in os.walk(folder, onerror=_unless_gone):
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
        temporary = self._temporary(path, data)
        try:
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
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

    def _key(self, key: str) -> str:
        _check_key(key, self.uri)
        return self.prefix + key

    @contextmanager
    def _answer(self) -> Iterator[Any]:
        """Yield the client; raise what goes wrong as a `StorageError` of one line."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield s3_client()
        except (BotoCoreError, ClientError, ValueError) as error:
            raise StorageError(f"{self.uri}: {_s3_problem(error)}") from error

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""
        with self._answer() as client:
            try:
                body: bytes = client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            except client.exceptions.NoSuchKey as error:
                raise FileNotFoundError(f"{self.uri}/{key}") from error
        return body

    def exists(self, key: str) -> bool:
        """Tell whether the object is there."""
        return self.entry(key) is not None

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry by one request, or None if there is none."""
        from botocore.exceptions import ClientError

        with self._answer() as client:
            try:
                head = client.head_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        return Entry(key, head["ContentLength"], head["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`."""
        with self._answer() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            entries = [
                Entry(item["Key"].removeprefix(self.prefix), item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", [])
            ]
        return sorted(entries, key=lambda entry: entry.key)

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object by one conditional request; False if it exists.

        A request that is repeated because its answer was lost finds its own object, and so returns False too.
        """
        from botocore.exceptions import ClientError

        with self._answer() as client:
            for _ in range(CONFLICTS):
                try:
                    client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
                except ClientError as error:
                    if _status(error) == 412:
                        return False
                    if _status(error) != 409:
                        raise
                    time.sleep(1)
                else:
                    return True
        raise StorageError(f"{self.uri}: {key} is fought over by other writers; run again")

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object in one request."""
        with self._answer() as client:
            client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        with self._answer() as client:
            client.delete_object(Bucket=self.bucket, Key=self._key(key))


@cache
def s3_client() -> Any:
    """Return this process's S3 client, with retries for throttling and outages of some seconds."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": 10}))


def open_store(uri: str | Path) -> Store:
    """Return the store behind a local path or `s3://bucket/prefix`; raises `InputError` for another scheme."""
    if (address := _s3_address(uri)) is not None:
        bucket, path = address
        return S3Store(bucket, path.strip("/"))
    if "://" in str(uri):
        scheme = str(uri).partition("://")[0]
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; use a local path or s3://bucket/prefix")
    return LocalStore(Path(uri).expanduser().resolve())


def filesystem(uri: str | Path) -> tuple[arrow_fs.FileSystem, str]:
    """Return pyarrow's file system and the path on it, for random-access reads of large files."""
    if (address := _s3_address(uri)) is not None:
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


def _s3_address(uri: str | Path) -> tuple[str, str] | None:
    """Return bucket and path of an S3 address, None for anything else; `?` and `#` are letters like any other."""
    scheme, colon, rest = str(uri).partition(":")
    if not colon or scheme.lower() != "s3":
        return None
    bucket, _, path = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not bucket:
        raise InputError(f"{uri}: no bucket; write s3://BUCKET/PREFIX")
    return bucket, path


def _check_key(key: str, uri: str) -> None:
    path = PurePosixPath(key)
    if ".." in path.parts or path.is_absolute():
        raise InputError(f"key {key!r} leaves {uri}")


def _s3_problem(error: Exception) -> str:
    """Return what S3 or the way to it refuses, in one line, and how to mend it."""
    from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, PartialCredentialsError

    reason = " ".join(str(error).split())
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return f"{reason}; {HOW_TO_MEND.get(code, 'check the credentials and their right to list, read and write')}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"{reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, HTTPClientError):
        return f"{reason}; check the network and AWS_ENDPOINT_URL"
    return f"{reason}; check the address and the AWS settings"


def _status(error: Any) -> int:
    status: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status


def _unless_gone(error: OSError) -> None:
    # A folder that can't be read must not pass for an empty one.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_folder(folder: Path) -> None:
    # The new name itself is durable only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
