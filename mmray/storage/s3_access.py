"""Access to S3: addresses, the same credentials, region and endpoint for boto3 and pyarrow, and error messages."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow.fs import AwsStandardS3RetryStrategy

from mmray.errors import InputError, StorageError

REMEDIES = {
    "NoSuchBucket": "create the bucket or check its name",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "renew the credentials",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the bucket's region",
}
"""S3 error code → what the user can do. For any other code, the message asks for permissions."""
BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError")
"""Error codes that are transient whatever their HTTP status."""
SECRETS = re.compile(r"(?<=//)[^/\s]+(?=@)")
"""User and password in an address: they must not reach messages and logs."""
AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
"""Suffixes of hosts that pyarrow finds by the region alone."""


@cache
def _session() -> Any:
    import boto3

    return boto3.Session()


@cache
def s3_client() -> Any:
    """Return this process's S3 client, with retries for throttling and outages of a few seconds."""
    from botocore.config import Config

    # A new client follows a changed environment only with a new session.
    _session.cache_clear()
    return _session().client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": _attempts()}))


def _attempts() -> int:
    return int(os.environ.get("AWS_MAX_ATTEMPTS", 10))


def arrow_options() -> dict[str, Any]:
    """Return arguments for `pyarrow.fs.S3FileSystem` that give it the same access as `s3_client`.

    pyarrow by itself reads neither endpoint nor region from the AWS files, and can't assume a role by SSO. Credentials
    may expire: call this again for each file that is opened.
    """
    from botocore.exceptions import BotoCoreError, NoCredentialsError

    try:
        client = s3_client()
        found = _session().get_credentials()
        if found is None:
            raise NoCredentialsError
        credentials = found.get_frozen_credentials()
    except (BotoCoreError, ValueError) as error:
        raise StorageError(s3_problem(error)) from error
    options = {
        "access_key": credentials.access_key,
        "secret_key": credentials.secret_key,
        "session_token": credentials.token,
        "region": client.meta.region_name,
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=_attempts()),
    }
    # pyarrow finds hosts of AWS by the region; only other endpoints need to be named.
    endpoint = urlsplit(client.meta.endpoint_url)
    if not str(endpoint.hostname).endswith(AMAZON):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    return options


def s3_address(uri: str | Path) -> tuple[str, str] | None:
    """Return bucket and path of an S3 address, or None for anything else; `?` and `#` are ordinary characters.

    Raises InputError for an address without a bucket, or with a password.
    """
    scheme, colon, rest = str(uri).partition(":")
    if not colon or scheme.lower() != "s3":
        return None
    # Not `urlsplit`: it would cut a key at `?` or `#`.
    bucket, _, path = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not bucket:
        raise InputError(f"{uri}: no bucket; write s3://BUCKET/PREFIX")
    if "@" in bucket:
        # run.json and every log would keep the password.
        raise InputError(
            f"s3://…@{bucket.rpartition('@')[2]}: credentials don't belong in an address; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return bucket, path


def masked(text: str) -> str:
    """Return the text with user names and passwords removed from the addresses in it."""
    return SECRETS.sub("…", text)


def is_transient(error: Exception) -> bool:
    """Return whether a later request may succeed: S3 was unreachable, overloaded or failing itself."""
    from botocore.exceptions import ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as UnreachableError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or error.response.get("Error", {}).get("Code") in BUSY
    return isinstance(error, HTTPClientError | UnreachableError)


def s3_problem(error: Exception) -> str:
    """Return what went wrong with a request to S3, in one line, and how to fix it."""
    from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, PartialCredentialsError
    from botocore.exceptions import ConnectionError as UnreachableError

    reason = masked(" ".join(str(error).split()))
    if isinstance(error, ClientError):
        if is_transient(error):
            return f"{reason.rstrip('.')}; try again later"
        code = error.response.get("Error", {}).get("Code", "")
        return f"{reason}; {REMEDIES.get(code, 'check the credentials and their right to list, read and write')}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"{reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, HTTPClientError | UnreachableError):
        return f"{reason}; check the network and AWS_ENDPOINT_URL"
    return f"{reason}; check the address and the AWS settings"
