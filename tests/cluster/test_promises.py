"""What every job on a run keeps: no hard links are needed, paths are the run's, and one driver is at work at a time."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from mmray.cli import main
from mmray.cluster import labels_jobs, selecting
from mmray.cluster import properties as properties_job
from mmray.cluster.evaluation import EvaluationJob
from mmray.cluster.hallucination import HallucinationJob
from mmray.cluster.labels import run_selectivity
from mmray.cluster.perturb import PerturbJob
from mmray.cluster.pipeline import pipeline_settings, run_pipeline
from mmray.cluster.properties import PropertiesJob
from mmray.cluster.saliency import SaliencyJob
from mmray.cluster.selecting import SelectionJob
from mmray.demo import DATA
from mmray.engine import run as run_job
from mmray.errors import InputError
from mmray.evaluation.opinions.settings import opinion_settings, perturbation_settings
from mmray.evaluation.properties.settings import property_settings
from mmray.evaluation.settings import EvaluationSettings, evaluation_settings
from mmray.job_settings import worker_range
from mmray.neurons.labels.settings import selectivity_settings
from mmray.neurons.model import load_model
from mmray.neurons.selection_settings import selection_settings
from mmray.perception.alignment_settings import alignment_settings
from mmray.perception.settings import saliency_settings
from mmray.results.run import open_run
from mmray.runs.driver import drive_analysis
from tests.running import census_here

Job = Callable[[Path, Path], Any]
"""From a run and an empty folder to what the job amounts to."""
DATA_HERE = "data/d.parquet"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo whose data is a relative path; leave its own tables as they are."""
    home = tmp_path_factory.mktemp("promises")
    (home / "data").mkdir()
    rows = [row for row in pq.read_table(DATA).slice(0, 60).to_pylist() if row["language"] == "en"][:24]
    pq.write_table(pq.read_table(DATA).schema.empty_table().from_pylist(rows, pq.read_schema(DATA)), home / DATA_HERE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(home)
        assert census_here("demo", DATA_HERE, home / "run", shard_size=12).complete
    return home / "run"


@pytest.fixture(scope="module")
def edit(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmray.api import edit

    out = tmp_path_factory.mktemp("promises") / "edit"
    edit(str(run), **WISH).save(out)
    return out


WISH: dict[str, Any] = {"suppress": "broccoli", "method": "zero", "neurons": 2, "samples": 2, "kept": 0}


@contextmanager
def in_this_process() -> Iterator[None]:
    """Do the work of every job in this process, without Ray."""
    with ExitStack() as stack:
        cached = cache(load_model)
        for module in (properties_job, labels_jobs, selecting):
            stack.enter_context(patch.object(module, "load_model", cached))
        yield


def on_properties(run: Path, _: Path) -> Any:
    sizes = {"concepts": 1, "min_occurrences": 2, "images": 2, "maps": 1, "draws": 10}
    return run_job(PropertiesJob(property_settings({"run": str(run), "local": True, **sizes})))


def on_saliency(run: Path, _: Path) -> Any:
    sizes = {"images": 4, "maps": 1, "draws": 10, "methods": "detector"}
    return run_job(SaliencyJob(saliency_settings({"run": str(run), "local": True, **sizes})))


def on_hallucination(run: Path, _: Path) -> Any:
    values = {"run": str(run), "local": True, "limit": 4, "draws": 10}
    return run_job(HallucinationJob(opinion_settings(values)))


def on_perturb(run: Path, folder: Path) -> Any:
    values: dict[str, Any] = {"model": "demo", "data": str(run.parent / DATA_HERE), "out": str(folder / "moved")}
    values |= {"local": True, "limit": 2, "steps": 2, "draws": 10}
    return run_job(PerturbJob(perturbation_settings(values)))


def on_selectivity(run: Path, _: Path) -> Any:
    values = {"by": "domain", "permutations": 2, "bootstraps": 0, "local": True}
    return run_selectivity(selectivity_settings({"run": str(run), **values}))


def on_select(run: Path, _: Path) -> Any:
    values = {"concepts": ("broccoli",), "k": 2, "samples": 4, "local": True}
    return run_job(SelectionJob(selection_settings({"run": str(run), **values})))


def on_edit(run: Path, folder: Path) -> Any:
    options = [f"--{name}={value}" for name, value in WISH.items()]
    with pytest.raises(SystemExit) as ended:
        main(lambda: ["edit", *options, f"--out={folder / 'edit'}", str(run)])
    if ended.value.code:
        raise InputError("refused")
    assert open_edit(folder / "edit").settings["wishes"][0]["suppress"] == "broccoli"


def open_edit(folder: Path) -> Any:
    from mmray.editing.edit import open_edit

    return open_edit(folder)


def on_pipeline(run: Path, folder: Path) -> Any:
    data = str(run.parent / DATA_HERE)
    census = {"model": "demo", "data": data, "out": str(folder / "run"), "shard_size": 12}
    asked = {"data": data, "limit": 4, "text_count": 0, "bleu": False, "draws": 10}
    settings = {"census": census, "edits": {"no-broccoli": WISH}, "evaluation": asked, "local": True}
    return run_pipeline(pipeline_settings(settings))


def evaluate_on(edit: Path, run: Path, **more: object) -> Any:
    asked = {"data": str(run.parent / DATA_HERE), "limit": 4, "text_count": 0, "bleu": False, "draws": 10}
    values = {"run": str(run), "edit": str(edit), "local": True, **asked, **more}
    return run_job(EvaluationJob(evaluation_settings(values)))


JOBS: dict[str, tuple[Job, str]] = {
    "properties": (on_properties, "{run}/properties"),
    "saliency": (on_saliency, "{run}/saliency"),
    "hallucination": (on_hallucination, "{run}/hallucination"),
    "perturb": (on_perturb, "{folder}/moved/perturb"),
    "selectivity": (on_selectivity, "{run}/selectivity"),
    "select": (on_select, "{run}/select"),
    "edit": (on_edit, "{folder}/edit"),
    "pipeline": (on_pipeline, "{folder}/run/pipeline"),
}
"""Job → how it is run, and where its lease lies."""


def refuse_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in another folder than the run was begun from, on a disk without hard links."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "link", refuse_links)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", JOBS)
def test_a_job_works_from_anywhere_and_without_hard_links(run: Path, tmp_path: Path, name: str) -> None:
    job, _ = JOBS[name]
    with in_this_process():
        outcome = job(run, tmp_path)
    assert not getattr(outcome, "quarantined", {})


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_an_evaluation_works_without_hard_links(run: Path, edit: Path) -> None:
    with in_this_process():
        assert evaluate_on(edit, run).done


@pytest.mark.parametrize("name", JOBS)
def test_a_second_driver_is_refused(run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    job, place = JOBS[name]
    uri = place.format(run=run, folder=tmp_path)
    with drive_analysis(uri), in_this_process(), pytest.raises(InputError) as refusal:
        job(run, tmp_path)
    said = capsys.readouterr().err if name == "edit" else str(refusal.value)
    assert f"{uri}: another driver is at work on this run (process {os.getpid()} on " in said


def test_a_second_evaluation_of_an_edit_is_refused(run: Path, edit: Path) -> None:
    refused = pytest.raises(InputError, match="another driver is at work")
    with drive_analysis(f"{edit}/evaluations"), in_this_process(), refused:
        evaluate_on(edit, run)


@pytest.mark.usefixtures("elsewhere")
def test_four_at_once_set_no_healthy_unit_aside(run: Path) -> None:
    with in_this_process(), drive_analysis(f"{run}/properties"):
        for _ in range(4):
            with pytest.raises(InputError, match="another driver"):
                on_properties(run, run)
    assert not list(run.glob("properties/*/attempts/*/3"))


@pytest.mark.usefixtures("elsewhere")
def test_a_run_is_opened_with_the_data_of_its_home(run: Path) -> None:
    assert open_run(run).info["settings"]["data"] == str(run.parent / DATA_HERE)


def given(**workers: object) -> list[Any]:
    return [
        property_settings({"run": "r", **workers}),
        saliency_settings({"run": "r", **workers}),
        selectivity_settings({"run": "r", "by": "language", **workers}),
        opinion_settings({"run": "r", **workers}),
        perturbation_settings({"model": "m", "data": "d", "out": "o", **workers}),
        evaluation_settings({"run": "r", "edit": "e", "data": "d", **workers}),
        alignment_settings({"tower": "t", "model": "m", "data": "d", "out": "o", "validate_on": "v", **workers}),
    ]


def test_workers_are_a_number_or_a_range_everywhere() -> None:
    for asked, expected in ((2, (2, 2)), ("3", (3, 3)), ("2:4", (2, 4)), (None, None)):
        assert [worker_range(settings.workers) for settings in given(workers=asked)] == [expected] * 7
    for wrong in ("0", "4:2", "x", "2:"):
        with pytest.raises(InputError, match=r"MIN:MAX such as 2:16"):
            given(workers=wrong)


@pytest.mark.parametrize(
    ("change", "same"), [({"draws": 7}, True), ({"detector": "elsewhere"}, True), ({"seed": 1}, False)]
)
def test_what_an_evaluation_is_known_by(change: dict[str, Any], same: bool) -> None:
    one: EvaluationSettings = evaluation_settings({"run": "r", "edit": "e", "data": "d", "detector": "demo"})
    other = one.model_copy(update=change)
    # What a detector is, is among the digests.
    assert (one.fingerprint({"detector": "x"}) == other.fingerprint({"detector": "x"})) == same
    assert one.fingerprint({"detector": "x"}) != one.fingerprint({"detector": "y"})
