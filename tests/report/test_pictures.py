"""A report shows the pictures of its run's samples, also where an image has several captions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.report.writing import run_pictures
from mmray.runs.run import open_run
from tests.support.data_files import write_coco, write_parquet
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes


@pytest.mark.parametrize("form", ["coco", "parquet"])
@pytest.mark.parametrize("captions", ["dataset", "generate"])
def test_every_sample_has_its_picture(tiny: Callable[[str], Path], tmp_path: Path, form: str, captions: str) -> None:
    rows = scenes(4)
    if form == "coco":
        data = write_coco(tmp_path, rows)
        content = json.loads(data.read_text())
        content["annotations"] += [note | {"id": 900 + n} for n, note in enumerate(content["annotations"])]
        data.write_text(json.dumps(content))
    else:
        data = write_parquet(tmp_path, [row | {"caption": [row["caption"], f"{row['caption']} Yes."]} for row in rows])
    outcome = census_here(tiny("llava"), str(data), tmp_path / "run", captions=captions, shard_size=3)
    assert outcome.samples == (8 if captions == "dataset" else 4)
    run = open_run(tmp_path / "run")
    assert (run.status().samples_done, run.status().samples) == (outcome.samples, outcome.samples)
    names = run.table("captions")["sample_id"].to_pylist()
    assert len(names) == len(set(names)) == outcome.samples
    assert set(run_pictures(run, names)) == set(names)
