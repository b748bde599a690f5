"""The experiment of Pan et al. 2024 as one command, on a few of the demo's scenes."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmray as package
from mmray.demo import DATA
from mmray.features.properties.comparison import METHODS
from mmray.runs.run import open_run
from mmray.terminal.config import read_config
from tests.support.local_jobs import KEPT_TEXT, pipeline_here

PAN = Path(__file__).parents[2] / "jobs/configs/papers/pan2024.yaml"
EDITS = ("pan", "fine", "ours", "random")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the finished pipeline on English scenes, with an edit of their most frequent object."""
    folder = tmp_path_factory.mktemp("pan")
    rows = [row for row in pq.read_table(DATA).slice(0, 320).to_pylist() if row["language"] == "en"]
    counts = Counter(name for row in rows for name in row["objects"])
    (source, _), (target, _) = counts.most_common(2)
    # Images of the two, and a few others.
    chosen = [row for row in rows if {source, target} & set(row["objects"])][:14]
    chosen += [row for row in rows if not {source, target} & set(row["objects"])][:14]
    data = folder / "scenes.parquet"
    pq.write_table(pa.Table.from_pylist(chosen, schema=pq.read_schema(DATA)), data)
    small = {"source": source, "target": target, "samples": 4, "kept": 8, "keep_text": KEPT_TEXT, "steps": 5}
    overrides = ["model=demo", f"data={data}", f"out={folder / 'run'}", "census.nouns=auto"]
    overrides += [f"edits.{name}.{key}={value}" for name in EDITS for key, value in small.items()]
    overrides += [f"edits.{name}.neurons=50" for name in ("ours", "random")]
    overrides += [f"steps.0.properties.{key}={value}" for key, value in (("concepts", 1), ("images", 4), ("draws", 50))]
    overrides += ["steps.0.properties.min_occurrences=3", "steps.0.properties.maps=1"]
    overrides += ["evaluation.limit=6", "evaluation.text_count=2", "evaluation.pope_objects=0", "evaluation.draws=20"]
    overrides += ["evaluation.bleu=false"]
    return pipeline_here(read_config(PAN, overrides))


def test_captions_are_generated_after_the_prefix(done):
    assert done.complete, (done.quarantined, done.steps)
    captions = done.run.table("captions").to_pylist()
    assert captions
    assert not any(row["caption"].casefold().startswith("an image of") for row in captions)
    assert done.run.info["settings"]["captions"] == "generate"


def test_the_paper_s_table_has_every_method_measure_interval_and_control(done):
    rows = [row for row in done.run.properties().to_pylist() if row["property"] == "comparison"]
    cells = {(row["method"], row["measure"]): row for row in rows}
    columns = {"inference_score", "lemma_hit_rate", "overlap", "jaccard", "common_share", "auroc"}
    columns |= {f"{change}_{part}" for change in ("zeroed", "noise") for part in ("own", "other")}
    missing = {(method, column) for method in METHODS for column in columns} - cells.keys()
    # A random order has no patches to look at.
    assert missing == {("random", "overlap")}
    assert all(row["n"] > 0 and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert cells["contribution", "zeroed_own"]["value"] > cells["random", "zeroed_own"]["value"]
    held_out = [row for row in rows if row["measure"] in ("auroc", "zeroed_own", "noise_own", "inference_score")]
    assert all(row["protocol"].startswith("ranked on half of the concept's images") for row in held_out)


def test_every_edit_is_measured_and_says_that_it_is_in_sample(done, tmp_path):
    run = open_run(done.run.uri)
    rows = run.table("evaluations").to_pylist()
    assert {row["edit"] for row in rows} == set(EDITS)
    assert run.table("edits")["method"].to_pylist() == ["pan", "fine", "learned", "random"]
    # Without evaluation.data there are no other images than those that ranked the neurons.
    other = [row for row in rows if row["measure"].startswith("image_generality")]
    assert other
    assert all(row["protocol"].startswith("in-sample") for row in other)
    layers = {name: set(done.edits[name].layer.tolist()) for name in EDITS}
    last = len(run.info["model"]["widths"]) - 1
    assert max(layers["fine"]) <= last - 3
    assert layers["ours"] == layers["random"] == {last}
    success = {row["edit"]: row["after"] for row in rows if row["measure"] == "reliability"}
    assert success["pan"] == 1
    page = Path(package.write_report(run, tmp_path / "report.html")).read_text()
    assert "The table of Pan et al. 2024" in page
    assert "Edits compared" in page
    assert json.dumps("inference_score") in page
