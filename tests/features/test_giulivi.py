"""The pipeline of Giulivi & Boracchi (2024) on demo scenes: localisation, answers and confidence, bias."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmray as package
from mmray.demo import DATA
from mmray.errors import InputError
from mmray.features.pipeline.job import pipeline_settings
from mmray.runs.run import open_run
from mmray.terminal.config import read_config
from tests.support.local_jobs import pipeline_here

PAPER = Path(__file__).parents[2] / "jobs/configs/papers/giulivi2024.yaml"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the run of the paper's pipeline over scenes of a single object, in place of birds and portraits."""
    folder = tmp_path_factory.mktemp("giulivi")
    rows = [row for row in pq.read_table(DATA).to_pylist() if row["language"] == "en" and len(row["objects"]) == 1][:6]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), folder / "scenes.parquet")
    one, other = rows[0]["objects"][0], rows[1]["objects"][0]
    overrides = ["model=demo", f"data={folder / 'scenes.parquet'}", f"out={folder / 'run'}", "detector=demo"]
    overrides += ["steps.0.saliency.methods=alignment-any, detector, centre"]
    overrides += [f"steps.1.hallucination.{setting}" for setting in ("limit=4", "questions=1", "longest=24")]
    question, pairs = json.dumps([f"Is there a {one} in the image?"]), json.dumps([f"{one}:{other}", f"{other}:{one}"])
    asked = (f"question={question}", f"pair={pairs}", "parse=yes_no", "steps=2")
    overrides += [f"steps.2.bias.{setting}" for setting in asked]
    assert pipeline_here(read_config(PAPER, overrides)).complete
    return open_run(folder / "run"), len(rows)


def test_the_pipeline_gives_the_paper_s_tables_with_controls(run, tmp_path):
    opened, images = run
    boxes = [row for row in opened.table("saliency").to_pylist() if row["measure"] == "max_box_accuracy"]
    assert {row["method"] for row in boxes} == {"alignment-any", "detector", "centre"}
    assert all(row["n"] == images and "Choe et al." in row["protocol"] for row in boxes)
    found = {row["method"]: row["value"] for row in boxes}
    assert found["detector"] > 0.5
    confidence = [row for row in opened.table("opinions").to_pylist() if row["measure"].startswith("mean_")]
    assert {row["claims"] for row in confidence} >= {"caption", "question", "yes"}
    bias = opened.table("bias").to_pylist()
    for pair in {(row["source"], row["target"]) for row in bias}:
        own = {row["condition"]: row for row in bias if (row["source"], row["target"]) == pair}
        assert own.keys() >= {"sign step", "sign step unrelated", "sign step random", "steps", "unrelated", "random"}
        assert all(row["n"] + row["unread_before"] + row["unread_after"] >= row["asked"] for row in own.values())
    page = Path(package.write_report(opened, tmp_path / "report.html")).read_text()
    index = page.replace(": ", ":")
    assert '"condition":"sign step"' in index and '"measure":"mean_absent"' in index and "max_box_accuracy" in index


def test_one_detector_serves_every_step_that_queries_one():
    values = read_config(PAPER, ["model=M", "data=D", "out=O", "detector=OWL", "alignment=W"])
    assert pipeline_settings(values).detecting == {"detector": "OWL", "alignment": "W"}
    text = json.dumps(values["steps"])
    # No step of the file names its own, which would be taken instead.
    assert '"detector"' not in text and '"alignment"' not in text
    with pytest.raises(InputError, match="steps, selectivity: unknown setting 'detector'"):
        pipeline_settings(values | {"steps": [{"selectivity": {"by": "language", "detector": "x"}}]})
