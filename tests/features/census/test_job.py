"""The driver and a worker in one process: what goes wrong in a shard stays there, and what is wrong at all is told."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from mmray.demo import DATA
from mmray.engine.ray import _Actor
from mmray.engine.units import WorkOrder
from mmray.errors import InputError, StorageError
from mmray.features.census.job import CensusJob
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.features.census.tables import TABLES
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from mmray.storage import LocalStore, open_store
from tests.support.local_jobs import census_here, files


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llava")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three files of eight English scenes each."""
    rows = [row for row in pq.read_table(DATA).slice(0, 200).to_pylist() if row["language"] == "en"][:24]
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        part = pa.Table.from_pylist(rows[8 * number : 8 * number + 8], schema=pq.read_schema(DATA))
        pq.write_table(part, folder / f"{number}.parquet")
    return folder


def unleased(found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return what is no lease, nor a folder of a job that was refused."""
    return {name: status for name, status in found.items() if not name.startswith("lease/") and "/lease/" not in name}


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_file_that_changes_under_way_costs_its_shard(model: Path, data: Path, tmp_path: Path, damage: str) -> None:
    def change(_: object) -> None:
        if damage == "gone":
            (data / "1.parquet").unlink(missing_ok=True)
        else:
            os.truncate(data / "1.parquet", 1000)

    outcome = census_here(model, str(data), tmp_path / "run", shard_size=8, follow=change)
    assert not outcome.complete
    assert list(outcome.quarantined) == [1]
    assert "1.parquet" in outcome.quarantined[1]
    assert "changed since the run began" in outcome.quarantined[1]
    assert outcome.samples == 16
    run = open_run(tmp_path / "run")
    assert len(run.table("captions")) == 16
    assert run.status().quarantined == outcome.quarantined
    assert run.status().pending == 0


def test_a_shard_that_fails_twice_is_committed_at_the_third_attempt(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = census_here(model, str(data), tmp_path / "undisturbed", shard_size=8)
    failures: list[Exception] = [StorageError("s3://x: access denied"), OSError(errno.EIO, "Input/output error")]
    collect, tables = ShardAnalysis.collect, ShardAnalysis.tables

    def fail_at_first(self: ShardAnalysis, samples: Any) -> None:
        if self.shard_id == 1 and len(failures) == 2:
            raise failures.pop(0)
        collect(self, samples)

    def fail_at_the_end(self: ShardAnalysis) -> dict[str, pa.Table]:
        if self.shard_id == 1 and failures:
            raise failures.pop(0)
        return tables(self)

    monkeypatch.setattr(ShardAnalysis, "collect", fail_at_first)
    monkeypatch.setattr(ShardAnalysis, "tables", fail_at_the_end)
    outcome = census_here(model, str(data), tmp_path / "run", shard_size=8)
    assert outcome.complete
    assert not failures
    assert outcome.samples == undisturbed.samples
    for name in TABLES:
        assert open_run(tmp_path / "run").table(name).equals(open_run(tmp_path / "undisturbed").table(name)), name


def test_a_run_of_which_every_shard_is_quarantined(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise ValueError("never")

    monkeypatch.setattr(ShardAnalysis, "collect", run)
    outcome = census_here(model, str(data), tmp_path / "run", shard_size=8)
    assert outcome.quarantined == dict.fromkeys(range(3), "given up after 3 attempts: ValueError: never")
    opened = open_run(tmp_path / "run")
    for name in TABLES:
        assert opened.table(name).schema.names == TABLES[name].names
    with pytest.raises(InputError, match="no concept 'dog'"):
        opened.rank("dog")


def test_data_of_which_every_sample_fails(model: Path, tmp_path: Path) -> None:
    rows = pq.read_table(DATA).slice(0, 6).to_pylist()
    for row in rows:
        row["image"] = {"bytes": b"no picture", "path": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), tmp_path / "data.parquet")
    outcome = census_here(model, str(tmp_path / "data.parquet"), tmp_path / "run")
    assert (outcome.samples, outcome.failures, outcome.complete) == (6, 6, False)
    run = open_run(tmp_path / "run")
    assert set(run.table("errors")["sample_id"].to_pylist()) == {row["sample_id"] for row in rows}
    assert set(run.table("errors")["stage"].to_pylist()) >= {"decode"}
    assert run.neuron("L0.u0")["examples"] == []
    assert run.concepts == {}


def test_weights_that_do_not_load_end_the_run_with_one_line(model: Path, data: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(model, damaged)
    os.truncate(damaged / "model.safetensors", 500)
    with pytest.raises(InputError, match="damaged weights") as failure:
        census_here(damaged, str(data), tmp_path / "run")
    assert str(failure.value).startswith(f"{damaged}: ")
    assert "\n" not in str(failure.value)


def test_bad_input_found_in_a_shard_ends_the_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise InputError("the model takes no images; give another")

    monkeypatch.setattr(ShardAnalysis, "collect", run)
    with pytest.raises(InputError, match=r"^the model takes no images; give another$"):
        census_here(model, str(data), tmp_path / "run")
    assert not open_run(tmp_path / "run").status().quarantined


def test_a_finished_run_is_left_as_it_is(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = census_here(model, str(data), out, shard_size=8)
    before = files(out)
    again = census_here(model, str(data), out, shard_size=8, batch_size=3)
    assert again.already
    # But for the leases of both drivers.
    assert unleased(files(out)) == unleased(before)
    assert (again.samples, again.failures, again.quarantined) == (first.samples, 0, {})


def test_a_driver_that_died_while_merging_is_made_good(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    census_here(model, str(data), out, shard_size=8)
    tables = {name: open_run(out).table(name) for name in TABLES}
    before = files(out)
    # Some of its tables were written, and none were visible yet.
    (snapshot,) = (out / "snapshots" / "census").glob("*.json")
    snapshot.unlink()
    (out / "tables" / "rankings.parquet").unlink()
    (out / "tables" / "captions.parquet").write_bytes(b"of an earlier merge")
    assert not open_run(out).status().finished
    census_here(model, str(data), out, shard_size=8)
    assert all(open_run(out).table(name).equals(table) for name, table in tables.items())
    assert all(pq.read_table(out / "tables" / f"{name}.parquet").equals(table) for name, table in tables.items())
    committed = {name: found for name, found in before.items() if name.startswith(("shards/", "receipts/"))}
    assert {name: found for name, found in files(out).items() if name in committed} == committed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard_size": 9}, "shard_size was 8, now 9"),
        ({"limit": 20}, "limit was None, now 20"),
        ({"score": "gate"}, "score was 'contribution', now 'gate'"),
        ({"nouns": "textblob"}, "other nouns"),
        ({"data": "demo"}, "other data"),
        ({"model": "demo"}, "other model"),
    ],
)
def test_other_settings_on_a_run_are_refused(
    model: Path, data: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "run"
    census_here(model, str(data), out, shard_size=8, limit=None)
    before = files(out)
    asked = {"model": model, "data": str(data), "out": out, "shard_size": 8} | change
    with pytest.raises(InputError, match=rf"holds a run with other settings \(.*{said}.*\); choose another OUT"):
        census_here(**asked)
    assert unleased(files(out)) == unleased(before)


@pytest.mark.slow
def test_a_worker_that_starts_elsewhere_finds_relative_paths(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    census_here(model, "data", "run", shard_size=8)
    job = CensusJob(census_settings({"model": str(model), "data": "data", "out": "run", "shard_size": 8}))
    plan, begun = job.plan(), open_run("run").info["fingerprint"]
    monkeypatch.chdir("/")
    order = WorkOrder([job], [plan.context], [plan.units], ["run"], [begun])
    actor = _Actor(cloudpickle.dumps(order), 1, str(tmp_path))
    answers = actor({"unit": np.array([2, 0])})
    assert answers["problem"] == ["", ""]
    assert answers["size"] == [8, 8]


def test_a_run_that_cannot_be_written_is_told_before_any_work(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="can't write here"):
        census_here(model, str(data), tmp_path / "file" / "run")


def test_a_shard_both_quarantined_and_committed_counts_as_committed(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    census_here(model, str(data), out, shard_size=8)
    folder = RunFolder(LocalStore(out))
    folder.attempt(1)
    folder.quarantine(1, samples=8)
    status = open_run(out).status()
    assert (status.shards_done, status.pending, status.quarantined) == (3, 0, {})
    outcome = census_here(model, str(data), out, shard_size=8)
    assert outcome.complete
    assert open_store(out).exists("aside/000001.json")
