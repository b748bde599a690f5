"""The paper's pipeline: one command, and its table in the run and in the report."""

from pathlib import Path

import pytest

import mmray
from mmray.features.mmedit.summary import FIVE, HARMONIC, PROTOCOLS
from mmray.runs.run import open_run
from mmray.terminal.config import read_config
from tests.support.local_jobs import KEPT_TEXT, pipeline_here

MMEDIT = Path(__file__).parents[3] / "jobs/configs/papers/mmedit.yaml"

pytestmark = pytest.mark.slow


def test_the_pipeline_gives_the_paper_s_table(files: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = ["model=demo", "data=demo", f"out={tmp_path / 'run'}", "census.limit=12"]
    small = {"vqa": files[0], "captioning": files[1], "limit": 1, "kept": 4, "keep_text": KEPT_TEXT, "draws": 20}
    small |= {"methods": "learned"}
    done = pipeline_here(
        read_config(MMEDIT, [*overrides, *(f"steps.0.mmedit.{name}={value}" for name, value in small.items())])
    )
    assert done.complete
    run = open_run(done.run.uri)
    rows = {
        (row["task"], row["method"], row["protocol"], row["measure"]): row for row in run.table("mmedit").to_pylist()
    }
    for task in ("E-VQA", "E-IC"):
        for protocol in PROTOCOLS:
            assert all((task, "learned", protocol, measure) in rows for measure in (*FIVE, HARMONIC))
    assert rows["E-VQA", "learned", "published", "reliability"]["value"] == 1
    assert len(run.table("mmedit_edits")) == 2
    page = Path(mmray.write_report(run, tmp_path / "report.html")).read_text()
    assert "MMEdit" in page and "KE, MEND and SERAC are left out" in page
