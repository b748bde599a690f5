"""The drawn shards of the benchmark are merged into a run that opens."""

import json
from pathlib import Path

import pytest

from mmray.runs.run import open_run
from tests.bench import merge


def test_drawn_shards_become_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WIDTHS": (512, 512), "NEURONS": 1024, "KEPT": 256, "SAMPLES": 16, "CONCEPTS": 20}.items():
        monkeypatch.setattr(merge, name, value)
    merge.draw(tmp_path)
    merge.merge(tmp_path, 3)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = open_run(tmp_path / "run-3")
    assert told["concepts"] == f"{len(run.concepts):,}"
    assert len(run.table("neurons")) == 1024
    assert run.neuron("L1.u511")["examples"]
