"""A run on a real object gateway (Ceph): census, resume, refresh, reading back, and secrets that are checked."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import pytest

from mmray.features.census.refresh import refresh_run
from mmray.features.census.shard import ShardAnalysis
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from mmray.runs.sweep import sweep
from mmray.storage import commits_once, open_store, s3_client
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write
from tests.support.tables import same_tables

pytestmark = pytest.mark.slow

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
KEYS = {"AWS_ACCESS_KEY_ID": "MMRAYTEST", "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test"}
BUCKET = "mmray"


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Ceph on loopback; the environment points to it. Returns the name of a bucket."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd")
    folder = tmp_path_factory.mktemp("ceph")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "support" / "ceph_up.sh"
    try:
        started = subprocess.run(
            [script, folder, str(port), *KEYS.values()], capture_output=True, text=True, timeout=240, check=False
        )
        if started.returncode:
            pytest.fail(f"Ceph is installed and does not start: {(started.stderr or started.stdout).strip()[-300:]}")
        with pytest.MonkeyPatch.context() as patched:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patched.delenv(name)
            environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **KEYS}
            for name, value in environment.items():
                patched.setenv(name, value)
            s3_client.cache_clear()
            s3_client().create_bucket(Bucket=BUCKET)
            yield BUCKET
            s3_client.cache_clear()
    finally:
        for file in folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)


@pytest.fixture
def settings(tiny: Callable[[str], Path]) -> dict[str, Any]:
    return {"model": tiny("llava"), "shard_size": 3, "top_k": 3}


def test_a_run_from_beginning_to_end(
    ceph: str, settings: dict[str, Any], tmp_path: Path, mmray: Callable[..., Any]
) -> None:
    data, out = f"s3://{ceph}/data", f"s3://{ceph}/runs/whole"
    store = open_store(data)
    samples = scenes(15)
    for number in range(2):
        store.put(
            f"{number}.parquet", Path(write(tmp_path / f"{number}.parquet", samples[6 * number :][:6])).read_bytes()
        )
    analyse = ShardAnalysis.collect

    def stop(self: ShardAnalysis, rows: Any) -> Any:
        if self.shard_id == 2:
            raise KeyboardInterrupt
        return analyse(self, rows)

    # Census, stopped in the middle; then resumed,
    with patch.object(ShardAnalysis, "collect", stop), pytest.raises(KeyboardInterrupt):
        census_here(**settings, data=data, out=out)
    assert open_run(out).status().shards_done == 2
    first = {entry.key: entry.version for entry in open_store(out).list("receipts/")}
    assert census_here(**settings, data=data, out=out).samples == 12
    assert first.items() <= {entry.key: entry.version for entry in open_store(out).list("receipts/")}.items()
    # refreshed,
    store.put("2.parquet", Path(write(tmp_path / "2.parquet", samples[12:])).read_bytes())
    refreshed = refresh_run(out, local=True)
    assert (refreshed.new_samples, refreshed.outcome.samples) == (3, 15)
    # and read back: it is the run that a local disk would hold.
    shutil.rmtree(tmp_path / "local", ignore_errors=True)
    (tmp_path / "local").mkdir()
    for number in range(3):
        shutil.copy(tmp_path / f"{number}.parquet", tmp_path / "local")
    census_here(**settings, data=str(tmp_path / "local"), out=tmp_path / "run")
    same_tables(open_run(out), open_run(tmp_path / "run"))
    concept = next(iter(open_run(out).concepts))
    assert concept in mmray("rank", out, concept).out
    # What is noted of attempts is of no use once their units are committed.
    assert ", 0.0 MB" in mmray("status", out, "--sweep").out
    status = mmray("status", out, "--sweep")
    assert status.status == 0
    assert "swept 0 objects" in status.out
    assert "5 done, 0 pending, 0 quarantined of 5" in status.out
    assert mmray("diff", out, tmp_path / "run", "--limit", 0.001).status == 0


def test_it_keeps_what_was_committed_first(ceph: str) -> None:
    store = open_store(f"s3://{ceph}/conditions")
    assert commits_once(store)
    assert store.list() == []
    folder = RunFolder.at(f"s3://{ceph}/empty")
    folder.store.put("shards/000000/x-captions.parquet", b"orphan")
    assert sweep(folder, grace=-60).objects == 1


def test_a_wrong_secret_is_refused_in_one_line(
    ceph: str, mmray: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    s3_client.cache_clear()
    try:
        refusal = mmray("status", f"s3://{ceph}/runs/whole").refusal
        assert refusal.startswith(f"s3://{ceph}/runs/whole: ")
        assert refusal.endswith("check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        assert "a-wrong-secret" not in refusal
        data = f"s3://{ceph}/data"
        answer = mmray("census", "--local", "--model", "demo", "--data", data, "--out", f"s3://{ceph}/other")
        assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in answer.refusal
    finally:
        s3_client.cache_clear()


def test_credentials_from_files_serve_reading_and_writing(
    ceph: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    access, secret = KEYS.values()
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    s3_client.cache_clear()
    try:
        store = open_store(f"s3://{ceph}/files")
        store.put("data.parquet", Path(write(tmp_path / "data.parquet", scenes(3))).read_bytes())
        out = f"s3://{ceph}/files/run"
        assert census_here(**settings, data=f"s3://{ceph}/files/data.parquet", out=out).complete
        written = store.read("run/run.json").decode()
        assert access not in written
        assert secret not in written
    finally:
        s3_client.cache_clear()
