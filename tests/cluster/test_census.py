"""A census on a real local Ray: workers, shards, kills and resumes leave the same tables."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from mmray.cluster.census import run_census
from mmray.errors import InputError
from mmray.results.run import Run, open_run
from mmray.settings import census_settings

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]
SAMPLES = 96


def census(out: Path, **settings: object) -> Run:
    asked = {"model": "demo", "data": "demo", "out": str(out), "limit": SAMPLES, "shard_size": 32}
    outcome = run_census(census_settings(asked | settings))
    assert outcome.complete
    return open_run(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return census(tmp_path_factory.mktemp("run") / "undisturbed", workers=1)


def same_rankings(run: Run, other: Run) -> None:
    ours, theirs = run.table("rankings"), other.table("rankings")
    for name in ("concept", "rank", "neuron", "specific_rank", "n", "certified"):
        assert ours[name].to_pylist() == theirs[name].to_pylist(), name
    for name in ("score", "specific", "share", "activation", "score_std"):
        assert ours[name].to_pylist() == pytest.approx(theirs[name].to_pylist(), rel=1e-5, abs=1e-6), name


def sorted_rows(table: pa.Table) -> list[tuple[object, ...]]:
    names = ("sample_id", "concept", "token_id", "position")
    return sorted(zip(*(table[name].to_pylist() for name in names), strict=True))


@pytest.mark.parametrize("settings", [{"workers": 3, "shard_size": 32}, {"workers": 1, "shard_size": 50}])
def test_workers_and_shards_change_nothing(undisturbed: Run, tmp_path: Path, settings: dict[str, int]) -> None:
    run = census(tmp_path / "run", **settings)
    same_rankings(run, undisturbed)
    assert sorted_rows(run.table("occurrences")) == sorted_rows(undisturbed.table("occurrences"))


def test_a_killed_driver_costs_only_shards_in_flight(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mmray", "census", "--model", "demo", "--data", "demo", "--out", str(out)]
    driver = subprocess.Popen(
        [*command, "--limit", str(SAMPLES), "--shard-size", "32", "--workers", "1"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    committed = {path.name: path.read_bytes() for path in out.glob("shards/*.json")}
    assert committed
    run = census(out)
    assert {name: (out / "shards" / name).read_bytes() for name in committed} == committed
    same_rankings(run, undisturbed)
    samples = run.table("captions")["sample_id"].to_pylist()
    assert len(samples) == len(set(samples)) == SAMPLES


def test_other_settings_are_refused_and_the_same_redo_nothing(undisturbed: Run) -> None:
    out = Path(undisturbed.uri)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*")}
    with pytest.raises(InputError, match=r"other settings \(top_k was 20, now 5\)"):
        census(out, top_k=5)
    census(out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("shards/*")} == before
