"""The drawn shards of the benchmark are merged into a run that opens."""

import json
from pathlib import Path

import pytest

from mmray.engine import LocalExecutor
from mmray.features.census import ranges
from mmray.features.census.tables import TABLES
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from mmray.runs.tables import read_table
from mmray.storage import LocalStore
from tests.bench import merge, repeated

SMALL = {"WIDTHS": (512, 512), "NEURONS": 1024, "KEPT": 256, "SAMPLES": 16}


def test_drawn_shards_become_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(merge, name, value)
    monkeypatch.setattr(repeated, "CONCEPTS", 20)
    merge.draw(tmp_path)
    merge.merge(tmp_path, 3)
    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = open_run(tmp_path / "run-3")
    assert told["concepts"] == f"{len(run.concepts):,}"
    assert len(run.table("neurons")) == 1024
    assert run.neuron("L1.u511")["examples"]


def test_ranges_make_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(merge, name, value)
    monkeypatch.setattr(repeated, "CONCEPTS", 20)
    for name, value in {"NEURONS": 300, "PIECE": 40_000}.items():
        monkeypatch.setattr(ranges, name, value)
    monkeypatch.setattr(RunFolder, "commit_shard", RunFolder.commit_shard)
    merge.draw(tmp_path)
    merge.merge(tmp_path, 3)
    merge.merge_by_ranges(tmp_path, 3, LocalExecutor())
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["merged by ranges"]: row["units"] for row in told}.items() >= {"sums": "4", "driver": "1"}.items()
    store = LocalStore(tmp_path)
    for name in TABLES:
        alone, by_ranges = (read_table(store, name, f"{kind}-3/tables") for kind in ("run", "ranges"))
        assert (len(alone) or name == "errors") and alone.equals(by_ranges)
    assert open_run(tmp_path / "ranges-3").neuron("L1.u511")["examples"]
