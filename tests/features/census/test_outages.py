"""Storage that goes away for a while, or takes no more: nothing is lost, and no shard is blamed for it."""

import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mmray.engine import Progress
from mmray.errors import InputError, OutageError
from mmray.features.census import job
from mmray.runs.run import open_run
from mmray.storage import open_store, retries, s3_client, with_retries
from tests.support.local_jobs import census_here
from tests.support.outage import Proxy
from tests.support.scenes import scenes, write
from tests.support.tables import same_tables

OUTAGE = 4.0
"""Seconds: several times as long as the clients themselves try."""


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    server = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    # What the clients themselves try again is not what is tested here.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3_client.cache_clear()
    yield server
    s3_client.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tiny: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    data = write(tmp_path / "data.parquet", scenes(8))
    return {"model": tiny("llava"), "data": str(data), "shard_size": 2, "top_k": 3}


@pytest.mark.slow
def test_an_s3_that_answers_503_for_a_while(
    settings: dict[str, Any], proxy: Proxy, bucket: str, tmp_path: Path
) -> None:
    census_here(**settings, out=tmp_path / "undisturbed")
    folder = f"s3://{bucket}/{uuid.uuid4().hex}"
    open_store(folder).put("data.parquet", Path(settings["data"]).read_bytes())
    until: list[float] = []
    analyse = job.ShardAnalysis.collect

    def run(self: Any, samples: Any) -> Any:
        # It begins while a shard is read, and lasts beyond what the clients try themselves.
        if self.shard_id == 2 and not until:
            until.append(time.monotonic() + OUTAGE)
            proxy.down.set()
            threading.Timer(OUTAGE, proxy.down.clear).start()
        return analyse(self, samples)

    with patch.object(job.ShardAnalysis, "collect", run):
        outcome = census_here(**settings | {"data": f"{folder}/data.parquet"}, out=f"{folder}/run")
    assert time.monotonic() > until[0]
    assert proxy.refused > 3
    assert outcome.complete
    same_tables(open_run(f"{folder}/run"), open_run(tmp_path / "undisturbed"))
    # No shard was begun a second time on that account.
    attempts = [entry.key for entry in open_store(f"{folder}/run").list("attempts/")]
    assert attempts == [f"attempts/{shard:06d}/1" for shard in range(4)]


@pytest.mark.slow
def test_an_outage_that_outlasts_patience_ends_the_run_and_blames_no_shard(
    settings: dict[str, Any], proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 1.5)
    out = f"s3://{bucket}/{uuid.uuid4().hex}"

    def follow(progress: Progress) -> None:
        if progress.done == 2:
            proxy.down.set()

    with pytest.raises(InputError, match=r"^s3://.*ServiceUnavailable.*; try again later$") as refusal:
        census_here(**settings, out=out, follow=follow)
    assert "\n" not in str(refusal.value)
    proxy.down.clear()
    assert open_run(out).status().quarantined == {}
    assert census_here(**settings, out=out).complete
    assert open_run(out).status().shards_done == 4


def test_at_the_start_an_outage_is_told_at_once(settings: dict[str, Any], proxy: Proxy, bucket: str) -> None:
    proxy.down.set()
    began = time.monotonic()
    with pytest.raises(OutageError, match=r"^s3://"):
        census_here(**settings, out=f"s3://{bucket}/{uuid.uuid4().hex}")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("error", [OSError("a disk's own"), FileNotFoundError("gone"), ValueError("no outage")])
def test_only_outages_are_waited_out(error: Exception) -> None:
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        with_retries(action)
    assert len(calls) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for some of a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1280k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no right to mount a file system ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_and_loses_nothing(
    settings: dict[str, Any], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    with patch.object(job, "load_model", cache(job.load_model)):
        census_here(**settings, out=tmp_path / "undisturbed")
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        used = []
        # Each time a little more room: the disk is full at another place of the run.
        while ballast.stat().st_size:
            os.truncate(ballast, max(0, ballast.stat().st_size - 24 * 1024))
            try:
                assert census_here(**settings, out=small_disk / "run").complete
                break
            except (InputError, OSError) as error:
                assert "No space left on device" in str(error)
                used.append(sum(1 for _ in small_disk.glob("run/receipts/*.json")))
                assert not list(small_disk.glob("run/aside/*"))
    assert len(used) > 3
    assert used == sorted(used)
    assert used[-1] > 0
    same_tables(open_run(small_disk / "run"), open_run(tmp_path / "undisturbed"))
    assert not list(small_disk.rglob(".tmp-*"))
