"""What S3 refuses, and the way to it that is closed, in one line each."""

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import boto3
import pytest

from mmray.errors import StorageError
from mmray.storage import open_store, s3_client

REFUSALS = {
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "SignatureDoesNotMatch": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "check the credentials and their right to list, read and write",
}


class Refusing(BaseHTTPRequestHandler):
    """An S3 that answers every request with the error of its server."""

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code = self.server.code  # type: ignore[attr-defined]
        body = f"<Error><Code>{code}</Code><Message>You shall not\npass.</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def refusing() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give this process and those it starts an AWS environment of this test's own, without credentials."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    settings = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
        "AWS_CONFIG_FILE": f"{tmp_path}/none",
        "AWS_SHARED_CREDENTIALS_FILE": f"{tmp_path}/none",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps credentials once found
    s3_client.cache_clear()
    yield
    s3_client.cache_clear()


def message() -> str:
    """What reading a run at an S3 address says, which the command line prints as it is."""
    with pytest.raises(StorageError) as failure:
        open_store("s3://bucket/run").read("run.json")
    assert "\n" not in str(failure.value)
    assert str(failure.value).startswith("s3://bucket/run: ")
    return str(failure.value)


def with_credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.usefixtures("environment")
def test_credentials_that_are_refused(
    code: str, refusing: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing.code = code  # type: ignore[attr-defined]
    with_credentials(monkeypatch, f"http://127.0.0.1:{refusing.server_port}")
    assert code in message()
    assert message().endswith(REFUSALS[code])


@pytest.mark.usefixtures("environment")
def test_no_credentials() -> None:
    assert "AWS_ACCESS_KEY_ID" in message()


@pytest.mark.usefixtures("environment")
def test_an_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_credentials(monkeypatch, "http://127.0.0.1:9")
    assert "127.0.0.1:9" in message()
    assert message().endswith("check the network and AWS_ENDPOINT_URL")


@pytest.mark.usefixtures("environment")
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_credentials(monkeypatch, "not an address")
    assert "not an address" in message()


@pytest.mark.usefixtures("environment")
def test_the_command_line_says_it_in_one_line_with_status_2() -> None:
    command = [sys.executable, "-m", "mmray", "status", "s3://bucket/run"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1
    assert answer.stderr.startswith("mmray: s3://bucket/run: Unable to locate credentials; set AWS_ACCESS_KEY_ID")
