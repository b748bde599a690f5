"""`mmray serve` prints an address that opens the run, ends by Ctrl-C, and refuses what it can't do in one line."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mmray.runs.run import Run
from tests.support.command import Answer


@pytest.mark.slow
def test_the_printed_address_opens_the_run_until_ctrl_c(run: Run) -> None:
    command = [sys.executable, "-m", "mmray", "serve", run.uri, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout
        address = re.match(r"http://127\.0\.0\.1:\d+/\?token=\S{20,}", server.stdout.readline())
        assert address
        where = urlsplit(address[0])
        connection = HTTPConnection(str(where.hostname), where.port, timeout=30)
        connection.request("GET", f"/?{where.query}")
        assert connection.getresponse().status == 307
        assert "next: open it" in server.stdout.readline()
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
    assert "Traceback" not in errors


def test_a_port_in_use_and_a_folder_without_a_run_are_refused(mmray: Callable[..., Answer], run: Run, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = mmray("serve", run.uri, "--port", port).refusal
    assert said == f"--port {port}: Address already in use; take another one, or 0 for a free one"
    assert "no run here" in mmray("serve", tmp_path, "--port", 0).refusal
    assert "no edit here" in mmray("serve", run.uri, "--port", 0, "--edit", tmp_path).refusal
