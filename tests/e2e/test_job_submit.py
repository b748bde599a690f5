"""`ray job submit` of a census on a started cluster of two unequal nodes with logical GPUs and token authentication."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmray.runs.run import open_run
from mmray.storage import open_store
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What both sides share: the token in a file."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, alone: None) -> Iterator[str]:
    """Start a head with one GPU and a node with two, as `ray start` does; returns the address of the dashboard."""
    folder = tmp_path_factory.mktemp("ray")
    port, web = free_port(), free_port()
    head = ["--head", f"--port={port}", f"--dashboard-port={web}", "--num-cpus=1", "--num-gpus=1"]
    node = [f"--address=127.0.0.1:{port}", "--num-cpus=1", "--num-gpus=2"]
    started: list[subprocess.Popen[bytes]] = []
    # Short, for the names of Ray's sockets are below it.
    folders = Path(tempfile.mkdtemp(prefix="mmray-"))

    def start(name: str, words: list[str]) -> None:
        # A folder each, as on two machines: in a common one the second would unpack the job's files over the first's.
        own = [f"--temp-dir={folders / name}", f"--dashboard-agent-listen-port={free_port()}"]
        command = [*RAY, "start", *words, *own, "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block"]
        with (folder / f"{name}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    address = f"http://127.0.0.1:{web}"
    try:
        start("head", head)
        wait_for(lambda: nodes_alive(address, environment) >= 1, folder)
        start("node", node)
        wait_for(lambda: nodes_alive(address, environment) >= 2, folder)
        yield address
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folders, ignore_errors=True)


def ask(address: str, environment: dict[str, str], path: str) -> Any:
    """Return what the dashboard answers to who knows the token."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{address}/api/{path}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def nodes_alive(address: str, environment: dict[str, str]) -> int:
    try:
        listed = ask(address, environment, "v0/nodes")["data"]["result"]["result"]
    except (OSError, ValueError):
        return 0
    return sum(node["state"] == "ALIVE" for node in listed)


def wait_for(what: Callable[[], bool], logs: Path, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            raise AssertionError("\n".join(path.read_text()[-2000:] for path in logs.glob("*.log")))
        time.sleep(0.3)


def submit(address: str, environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [*RAY, "job", "submit", f"--address={address}", "--working-dir", str(ROOT), "--", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def status(address: str, environment: dict[str, str], answer: subprocess.CompletedProcess[str]) -> str:
    """Return Ray's word for how the job that was submitted has ended."""
    name = answer.stdout.partition("'raysubmit_")[2].partition("'")[0]
    return str(ask(address, environment, f"jobs/raysubmit_{name}")["status"])


def test_a_census_as_a_ray_job(
    dashboard: str, environment: dict[str, str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    data, out = write(tmp_path / "data.parquet", scenes(12)), tmp_path / "run"
    job = ("python", "jobs/census.py", "--config", "jobs/configs/demo.yaml")
    settings = {"model": tiny("llava"), "data": data, "shard_size": 2, "top_k": 3}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    answer = submit(dashboard, environment, *job, *overrides, f"out={out}", "workers=1:3", "gpus_per_worker=1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert status(dashboard, environment, answer) == "SUCCEEDED"
    assert "12 samples in" in answer.stdout
    found = open_run(out).status()
    assert (found.shards_done, found.pending, found.finished) == (6, 0, True)
    census_here(**settings, out=tmp_path / "local")
    # Workers with GPUs have more threads than this process: the last bits of sums may differ.
    ours, theirs = open_run(out), open_run(tmp_path / "local")
    assert ours.table("captions").equals(theirs.table("captions"))
    places = ["sample_id", "concept", "token", "token_id", "position"]
    assert ours.table("occurrences").select(places).equals(theirs.table("occurrences").select(places))
    scores, wanted = (
        {(row["concept"], row["neuron"]): row["score"] for row in run.table("rankings").to_pylist()}
        for run in (ours, theirs)
    )
    assert scores == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    # No node has three GPUs: one line, and the job is a failed one.
    refused = submit(dashboard, environment, *job, *overrides, f"out={tmp_path / 'other'}", "gpus_per_worker=3")
    assert refused.returncode == 1
    assert "--gpus-per-worker 3: no machine of the cluster has more than 2" in refused.stdout
    assert status(dashboard, environment, refused) == "FAILED"
    # Every worker had a GPU of its own, as far as Ray knows.
    attempts = [json.loads(open_store(out).read(entry.key)) for entry in open_store(out).list("attempts/")]
    assert 1 <= len({attempt["worker"] for attempt in attempts}) <= 3


def test_without_the_token_nothing_is_run(dashboard: str, environment: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=10)
    without = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    answer = submit(dashboard, without | {"RAY_AUTH_MODE": "disabled"}, "python", "-c", "print('run')")
    assert answer.returncode != 0
    assert "run\n" not in answer.stdout
