"""A prefix of an S3 bucket as a store: a commit is one conditional `PutObject` (`IfNoneMatch: *`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mmray.errors import InputError, StorageError
from mmray.storage.objects import Entry, check_key

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

    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", 10))
    return boto3.client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": attempts}))


def s3_address(uri: str | Path) -> tuple[str, str] | None:
    """Return bucket and path of an S3 address, None for anything else; `?` and `#` are letters like any other."""
    scheme, colon, rest = str(uri).partition(":")
    if not colon or scheme.lower() != "s3":
        return None
    bucket, _, path = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not bucket:
        raise InputError(f"{uri}: no bucket; write s3://BUCKET/PREFIX")
    return bucket, path


def _s3_problem(error: Exception) -> str:
    """Return what S3 or the way to it refuses, in one line, and how to mend it."""
    from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, PartialCredentialsError
    from botocore.exceptions import ConnectionError as UnreachableError

    reason = " ".join(str(error).split())
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return f"{reason}; {HOW_TO_MEND.get(code, 'check the credentials and their right to list, read and write')}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"{reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, HTTPClientError | UnreachableError):
        return f"{reason}; check the network and AWS_ENDPOINT_URL"
    return f"{reason}; check the address and the AWS settings"


def _status(error: Any) -> int:
    status: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status
