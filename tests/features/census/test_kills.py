"""Actors, drivers and nodes killed at random moments of several runs, on disk and on S3: nothing lost or doubled."""

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmray.errors import InputError
from mmray.features.census.job import run_census
from mmray.features.census.settings import census_settings
from mmray.runs.run import Run, open_run
from tests.support.kills import Cluster, Killer, cluster
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write
from tests.support.tables import same_tables

pytestmark = pytest.mark.slow

SHARDS = 12
ROUNDS = [
    ("local", ["actor", "driver", "actor"]),
    ("s3", ["actor", "node", "driver"]),
    ("local", ["driver", "actor", "node", "actor"]),
    ("s3", ["actor", "actor", "driver"]),
    ("local", ["node", "actor", "driver", "actor"]),
    ("s3", ["driver", "actor", "actor"]),
]
"""Where a run lies, and what is killed in it, in this order."""


@pytest.fixture(scope="module")
def ray(bucket: str, alone: None, forks: None) -> Iterator[Cluster]:
    with cluster(cores=1) as started:
        yield started


@pytest.fixture(scope="module")
def settings(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write(tmp_path_factory.mktemp("data") / "data.parquet", scenes(3 * SHARDS))
    return {"model": str(tiny("llava")), "data": str(data), "shard_size": 3, "top_k": 3, "workers": "2"}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    census_here(**{name: value for name, value in settings.items() if name != "workers"}, out=out)
    return open_run(out)


def check_kills(killer: Killer, kills: list[str], undisturbed: Run, data: str, *, in_commit: bool = False) -> None:
    """Kill all of these while the run goes on, then compare it with one that nobody disturbed."""
    try:
        for number, what in enumerate(kills):
            killer.strike(what, number * (SHARDS - 4) // len(kills), in_commit=in_commit)
        killer.finish()
    finally:
        killer.end()
    run = open_run(killer.settings["out"])
    same_tables(run, undisturbed)
    given = pq.read_table(data, columns=["sample_id"])["sample_id"].to_pylist()
    assert sorted(run.table("captions")["sample_id"].to_pylist()) == sorted(given)
    counted = run.sql("select concept, count(*) as n from occurrences group by concept order by concept")
    assert counted.equals(run.sql("select distinct concept, n from rankings order by concept"))
    # Each driver went on from what was committed, and left it as it was.
    assert killer.committed == {key: killer.store.read(key) for key in killer.committed}
    assert killer.killed == kills


def test_there_are_enough_kills() -> None:
    assert len(ROUNDS) >= 6
    assert sum(len(kills) for _, kills in ROUNDS) >= 20
    assert {where for where, _ in ROUNDS} == {"local", "s3"}


@pytest.mark.parametrize("number", range(len(ROUNDS)))
def test_random_kills_change_nothing(
    number: int, ray: Cluster, settings: dict[str, Any], undisturbed: Run, bucket: str, tmp_path: Path
) -> None:
    where, kills = ROUNDS[number]
    out = str(tmp_path / "run") if where == "local" else f"s3://{bucket}/{uuid.uuid4().hex}"
    killer = Killer(ray, settings | {"out": out}, seed=number)
    check_kills(killer, kills, undisturbed, settings["data"])


@pytest.mark.parametrize("kind", ["sound", "receipt first", "appended"])
def test_a_kill_within_a_commit(
    kind: str, ray: Cluster, settings: dict[str, Any], undisturbed: Run, tmp_path: Path
) -> None:
    killer = Killer(ray, settings | {"out": str(tmp_path / "run"), "workers": "1"}, kind=kind)
    if kind == "sound":
        check_kills(killer, ["actors"], undisturbed, settings["data"], in_commit=True)
    else:
        # The same test, and it has to fail.
        with pytest.raises(AssertionError):
            check_kills(killer, ["actors"], undisturbed, settings["data"], in_commit=True)
        assert killer.killed


def test_two_drivers_at_once(ray: Cluster, settings: dict[str, Any], undisturbed: Run, tmp_path: Path) -> None:
    one_each = settings | {"out": str(tmp_path / "run"), "workers": "1"}
    first = Killer(ray, one_each)
    try:
        first.wait(lambda: len(first.receipts()) >= 1)
        # The second is refused, at once and in one line,
        with pytest.raises(InputError, match=rf"another driver is at work on this run \(process {first.driver.pid} on"):
            run_census(census_settings(one_each | {"address": ray.address}))
        # and where it slips through, both do all the work between them, and merge.
        second = Killer(ray, one_each, leased=False)
        try:
            # They merge one after the other: without a lease, each takes the other's unfinished tables for leftovers.
            first.wait(lambda: len(first.receipts()) >= SHARDS - 2)
            os.kill(first.driver.pid or 0, signal.SIGSTOP)
            try:
                second.finish()
            finally:
                os.kill(first.driver.pid or 0, signal.SIGCONT)
        finally:
            second.end()
        first.finish()
    finally:
        first.end()
    same_tables(open_run(tmp_path / "run"), undisturbed)
