"""An OWL-ViT's sight in a LLaVA from end to end on Ray, both tiny: aligned, and then looked by with every command."""

import os
from pathlib import Path
from typing import Any

import pytest

from mmray.detector.alignment import FACTS, WEIGHTS
from mmray.engine import run as run_job
from mmray.features.alignment.job import run_alignment
from mmray.features.alignment.settings import alignment_settings
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.perturb_job import PerturbJob
from mmray.features.hallucination.settings import hallucination_settings, perturbation_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.methods import METHODS
from mmray.features.saliency.observations import CHANCE
from mmray.features.saliency.settings import saliency_settings
from mmray.runs.run import open_run
from mmray.runs.tables import read_table
from mmray.storage import open_store
from tests.support.local_jobs import census_here
from tests.support.owls import build_owl
from tests.support.scenes import scenes, write

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone", "ray_here")]
DRAWS = {"draws": 10, "workers": 1}


@pytest.fixture(scope="module")
def aligned(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return model, data, and the detector with its alignment, by the names of settings."""
    folder = tmp_path_factory.mktemp("joint")
    data = write(folder / "data.parquet", scenes(4))
    made = {"model": str(tiny("llava")), "data": data, "out": str(folder / "W")}
    owl = str(build_owl("owlvit", folder / "owl"))
    asked = {**made, "tower": owl, "validate_on": data, "network": "projector", "batch_size": 2, **DRAWS}
    done = run_alignment(alignment_settings(asked))
    assert (done.images, done.steps) == (4, 2)
    return {"model": made["model"], "data": data, "sight": {"detector": owl, "alignment": made["out"], **DRAWS}}


@pytest.fixture(scope="module")
def run(aligned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("joint") / "run"
    assert census_here(aligned["model"], aligned["data"], out).complete
    return str(out)


def test_words_are_explained_by_every_method(aligned: dict[str, Any], run: str) -> None:
    done = run_job(SaliencyJob(saliency_settings({"run": run, "images": 2, "maps": 1, **aligned["sight"]})))
    assert done.complete and done.headline["images"] == 2
    rows = open_run(run).table("saliency").to_pylist()
    assert {row["method"] for row in rows} == {*METHODS, CHANCE}


def test_claims_are_judged(aligned: dict[str, Any], run: str) -> None:
    done = run_job(HallucinationJob(hallucination_settings({"run": run, "limit": 2, **aligned["sight"]})))
    assert done.complete and done.headline["rows"]
    claims = open_run(run).table("claims").to_pylist()
    assert {claim["kind"] for claim in claims} >= {"present", "random"}
    assert all(0 < claim["confidence"] < 1 for claim in claims)


def test_what_is_seen_is_moved(aligned: dict[str, Any], tmp_path: Path) -> None:
    names = {"model": aligned["model"], "data": aligned["data"], "out": str(tmp_path / "moved")}
    settings = perturbation_settings({**names, "limit": 2, "steps": 2, **aligned["sight"]})
    done = run_job(PerturbJob(settings))
    assert done.complete
    answers = read_table(open_store(names["out"]), "answers").to_pylist()
    assert {answer["about"] for answer in answers} == {"source", "target", "unrelated"}
    assert all((answer["norm"] > 0) == (answer["condition"] != "original") for answer in answers)
    # What is known of the alignment is what it holds, and not when that was written.
    for name in (WEIGHTS, FACTS):
        os.utime(Path(aligned["sight"]["alignment"]) / name, (1, 1))
    assert run_job(PerturbJob(settings)).headline["measures"] == done.headline["measures"]
