"""A command that has said what it has to say ends with its status, and not in an abort while Python shuts down."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmray.runs.run import Run

TIMES, AT_ONCE = 8, 2


@pytest.mark.slow
def test_status_ends_without_an_abort_however_often(run: Run) -> None:
    # A thread of Arrow that let go of Python's memory during shutdown aborted one process in twelve. That no thread
    # does is tested exactly in tests/runs/test_tables.py.
    environment = os.environ | {"OMP_NUM_THREADS": "4"}  # Arrow's threads, however many cores there are
    command = [sys.executable, "-m", "mmray", "status", run.uri]

    def status(_: int) -> tuple[int, str]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(status, range(TIMES))) == [(0, "")] * TIMES
