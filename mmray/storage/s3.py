"""A prefix of an S3 bucket as a store: a commit is one conditional `PutObject` (`IfNoneMatch: *`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmray.errors import OutageError, StorageError
from mmray.storage.objects import Entry, check_key, too_large
from mmray.storage.s3_access import is_transient, s3_client, s3_problem

CONFLICTS = 10
"""Attempts at a conditional write while S3 reports another write to the same key in progress (status 409)."""


class S3Store:
    """A prefix of an S3 bucket; credentials, region and endpoint come from the usual AWS environment and files."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        check_key(key, self.uri)
        return self.prefix + key

    @contextmanager
    def _answer(self) -> Iterator[Any]:
        """Yield the client, and turn its errors into a `StorageError` of one line."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield s3_client()
        except (BotoCoreError, ClientError, ValueError) as error:
            kind = OutageError if is_transient(error) else StorageError
            raise kind(f"{self.uri}: {s3_problem(error)}") from error

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""
        return self._read(key)

    def read_at_most(self, key: str, most: int) -> bytes:
        """Return the whole object; ValueError, before reading it, if it is larger."""
        return self._read(key, most)

    def _read(self, key: str, most: int | None = None) -> bytes:
        with self._answer() as client:
            try:
                response = client.get_object(Bucket=self.bucket, Key=self._key(key))
            except client.exceptions.NoSuchKey as error:
                raise FileNotFoundError(f"{self.uri}/{key}") from error
            size = response["ContentLength"]
            body: bytes | None = None if most is not None and size > most else response["Body"].read()
            # An unread body would keep its connection out of the pool.
            response["Body"].close()
        if body is None:
            raise ValueError(too_large(size, size if most is None else most))
        return body

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""
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
                # The response to a HEAD has no body that says why it was refused; that to a listing does, and raises.
                client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(key), MaxKeys=1)
                raise
        # An ETag comes in quotes.
        return Entry(key, head["ContentLength"], head["ETag"].strip('"'), head["LastModified"].timestamp())

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`."""
        with self._answer() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            entries = [
                Entry(
                    item["Key"].removeprefix(self.prefix),
                    item["Size"],
                    item["ETag"].strip('"'),
                    item["LastModified"].timestamp(),
                )
                for page in pages
                for item in page.get("Contents", [])
            ]
        return sorted(entries, key=lambda entry: entry.key)

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object by one conditional request; False if it exists.

        A request retried because its response was lost finds its own object, and so returns False too.
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
                    # 409: a write to the same key is in progress, and may still fail. 412: the key exists.
                    time.sleep(1)
                else:
                    return True
        raise StorageError(f"{self.uri}: {key} is being written by others at the same time; run again")

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object in one request."""
        with self._answer() as client:
            client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        with self._answer() as client:
            client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def incomplete_writes(self) -> Sequence[Entry]:
        """Return nothing: an object is one request, and S3 discards requests that were cut off."""
        return []


def _status(error: Any) -> int:
    status: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status
