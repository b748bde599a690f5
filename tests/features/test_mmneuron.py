"""The pipeline of Huo et al. (2024) on questions about demo scenes: neurons of every module, masks, answers, lens."""

import json
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

import mmray as package
from mmray.errors import InputError
from mmray.features.pipeline.job import pipeline_settings
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import selectivity_settings
from mmray.features.selectivity.view import analysis
from mmray.models.options import MODULES
from mmray.runs.run import open_run
from mmray.terminal.config import read_config
from tests.support.local_jobs import pipeline_here
from tests.support.vqa_files import vqa_file

PAPER = Path(__file__).parents[2] / "jobs/configs/papers/mmneuron.yaml"
TABLES = ("selective_labels", "selectivity", "interventions", "masked_answers", "stages")

pytestmark = pytest.mark.slow


def judge(question: str, reply: str, answers: tuple[str, ...]) -> float:
    """Return whether a reply says anything: a judge of one's own."""
    return float(bool(question and answers and reply))


def overrides(data: str, run: Path) -> list[str]:
    scores = ["fluent=vqa", "lineart=anls", f"{judge.__module__}:{judge.__name__}"]
    few = ("permutations=1", "bootstraps=1", "held_out=0.3", "longest=4", f"accuracy={json.dumps(scores)}")
    return ["model=demo", f"data={data}", f"out={run}", "census.prompt=null"] + [
        f"steps.0.selectivity.{setting}" for setting in few
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the run of the paper's pipeline over scenes of three styles."""
    folder = tmp_path_factory.mktemp("mmneuron")
    data = vqa_file(folder / "questions.parquet", 21, ("fluent", "lineart", "noto"))
    assert pipeline_here(read_config(PAPER, overrides(data, folder / "run"))).complete
    return open_run(folder / "run")


def rows_of(run, name, **wanted):
    return [row for row in run.table(name).to_pylist() if all(row[key] == value for key, value in wanted.items())]


def test_every_module_has_its_neurons_and_tests_alone_and_together(run):
    modules = [module for module in MODULES if run.info["model"]["module_widths"].get(module, [1])]
    widths = run.info["model"]["module_widths"] | {"language": run.info["model"]["widths"]}
    for module in modules:
        summary = rows_of(run, "selective_labels", module=module)
        assert {row["label"] for row in summary} == {"fluent", "lineart", "noto"}
        # One percent of each module, by its own threshold.
        assert {row["union"] for row in summary} == {round(0.01 * sum(widths[module]))}
        assert {row["modality"] for row in summary} == {"all" if module == "language" else "image"}
    tests = rows_of(run, "interventions", measure="accuracy")
    assert {row["module"] for row in tests} == {*modules, "all"}
    for mask in rows_of(run, "interventions", module="all", measure="accuracy"):
        key = {name: mask[name] for name in ("masked", "label", "control", "measure")}
        alone = [row for module in modules for row in rows_of(run, "interventions", module=module, **key)]
        assert mask["neurons"] == sum(row["neurons"] for row in alone)
        assert {row["n"] for row in alone} == {mask["n"]}
    for row in tests:
        if row["control"] == "random":
            key = {name: row[name] for name in ("module", "masked", "label", "measure")}
            (chosen,) = rows_of(run, "interventions", control="selected", **key)
            assert row["neurons"] == chosen["neurons"]
        assert row["low"] <= row["change"] <= row["high"]


def test_each_domain_is_scored_as_its_benchmark_does(run):
    protocols = {row["label"]: row["protocol"] for row in rows_of(run, "interventions", measure="accuracy")}
    assert "VQA accuracy" in protocols["fluent"]
    assert "ANLS" in protocols["lineart"]
    assert f"judged by {judge.__module__}:judge" in protocols["noto"]
    assert all("at most 4 tokens" in protocol for protocol in protocols.values())
    plain = rows_of(run, "masked_answers", module="all", masked=None)
    for label in protocols:
        own = [row["score"] for row in plain if row["label"] == label]
        (before,) = {row["before"] for row in rows_of(run, "interventions", measure="accuracy", label=label)}
        assert before == pytest.approx(sum(own) / len(own))
    # Three of ten people answer every third question otherwise; seven are enough.
    assert {row["score"] for row in plain if row["label"] == "fluent"} <= {0.0, 0.9, 1.0}


def test_the_lens_has_every_module_s_masks(run):
    for row in rows_of(run, "stages"):
        assert (row["shift"] > 0) <= (row["masked"] is not None)
    moved = {(row["module"], row["control"]) for row in rows_of(run, "stages") if row["shift"] > 0}
    assert moved >= {(name, control) for name in ("language", "vision", "all") for control in ("selected", "random")}


def test_the_report_and_the_terminal_show_the_paper_s_tables(run, tmp_path):
    page = Path(package.write_report(run, tmp_path / "report.html")).read_text("utf-8")
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    first, *others = json.loads(data)["index"]["selectivity"]
    assert (first["module"], [row["module"] for row in others]) == ("all", first["together"]["modules"])
    effects = first["together"]["effects"]
    assert {row["module"] for row in effects} == {"all", *first["together"]["modules"]}
    assert {"accuracy", "nll"} <= {row["measure"] for row in effects}
    console = Console(width=200, record=True, file=StringIO())
    console.print(analysis({name: run.table(name) for name in TABLES}))
    shown = console.export_text()
    assert "own samples · mean score of answers, held-out questions" in shown
    assert all(f"lape · {module}" in shown for module in first["together"]["modules"])


def test_other_neurons_of_a_module_outdate_what_was_measured_together(run):
    step = pipeline_settings(read_config(PAPER, overrides("demo", Path(run.uri)))).steps[0]["selectivity"] or {}
    assert rows_of(run, "interventions", module="all")
    tests = {"interventions": False, "stages": False}
    single = {**step, **tests, "run": str(run.uri), "module": "language", "local": True}
    kept = run_selectivity(selectivity_settings(single))
    # The same neurons are chosen, and nothing is out of date.
    assert kept.outdated == ()
    assert rows_of(open_run(run.uri), "interventions", module="all")
    changed = run_selectivity(selectivity_settings(single | {"rate": 0.05}))
    assert set(changed.outdated) == {"interventions", "masked_answers", "stages"}
    again = open_run(run.uri)
    assert {row["module"] for row in again.table("interventions").to_pylist()} <= {"vision", "projector"}
    assert isinstance(again.table("masked_answers"), pa.Table)


def test_a_label_that_the_data_lacks_is_refused(run):
    wrong = {"run": str(run.uri), "by": "domain", "accuracy": ["medical=letter"], "interventions": True, "local": True}
    with pytest.raises(InputError, match="--accuracy medical=letter: no label 'medical' in fluent, lineart, noto"):
        run_selectivity(selectivity_settings(wrong))
