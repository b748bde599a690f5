"""Census → edits → evaluations as one job: tables, resumption, and what is refused before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmray.demo import EVALUATION
from mmray.errors import InputError
from mmray.features import table_schemas
from mmray.features.editing import job as editing_job
from mmray.features.editing.edit import open_edit
from mmray.features.editing.methods import make_edit
from mmray.features.pipeline.job import Pipeline, pipeline_settings, run_pipeline
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from mmray.runs.snapshots import snapshots
from mmray.runs.status import analyses
from tests.support.local_jobs import KEPT_TEXT, census_here, pipeline_here

QUICK = {"kept": 8, "steps": 2, "samples": 3, "neurons": 10, "keep_text": KEPT_TEXT}


@pytest.fixture(scope="module")
def concepts(own_census: Callable[..., Path]) -> tuple[Path, list[str]]:
    out = own_census(64, shard_size=64)
    run = open_run(out)
    english = {row["sample_id"] for row in run.table("captions").to_pylist() if row["language"] == "en"}
    named = [row["concept"] for row in run.table("occurrences").to_pylist() if row["sample_id"] in english]
    return out, list(dict.fromkeys(named))[:3]


@pytest.fixture(scope="module")
def settings(concepts: tuple[Path, list[str]]) -> dict[str, Any]:
    out, (one, other, third) = concepts
    edits = {"swap": {"source": one, "target": other, **QUICK}, "gone": {"suppress": third, "method": "zero", **QUICK}}
    return {
        "census": {"model": "demo", "data": "demo", "out": str(out), "limit": 64, "shard_size": 64},
        "edits": edits,
        "evaluation": {
            "data": str(EVALUATION),
            "limit": 6,
            "text_count": 3,
            "pope_objects": 0,
            "draws": 20,
            "bleu": False,
        },
    }


@pytest.fixture(scope="module")
def done(settings: dict[str, Any]) -> Pipeline:
    return pipeline_here(settings)


def test_edits_lie_in_the_run_and_tables_tell_of_them(done: Pipeline, settings: dict[str, Any]) -> None:
    assert done.complete
    run = open_run(settings["census"]["out"])
    assert run.table("edits")["edit"].to_pylist() == ["swap", "gone"]
    for name in ("edits", "evaluations", "edit_captions"):
        assert run.table(name).schema.names == table_schemas()[name].names
        assert set(run.table(name)["edit"].to_pylist()) == {"swap", "gone"}
    for name, measures in done.measures.items():
        rows = {row["measure"]: row for row in run.table("evaluations").to_pylist() if row["edit"] == name}
        assert {key: row["after"] for key, row in rows.items()} == {key: row["after"] for key, row in measures.items()}
        assert open_edit(f"{run.uri}/edits/{name}").purposes == done.edits[name].purposes
    captions = run.table("edit_captions").to_pylist()
    assert all(row["changed"] == (row["before"] != row["after"]) for row in captions)


def test_again_nothing_is_done_again(done: Pipeline, settings: dict[str, Any]) -> None:
    place = Path(settings["census"]["out"]) / "edits" / "swap"
    before = {name: (place / name).stat().st_mtime_ns for name in ("edit.json", "edit.safetensors")}
    again = pipeline_here(settings)
    assert {name: (place / name).stat().st_mtime_ns for name in before} == before
    assert again.measures == done.measures


def test_an_edit_that_is_gone_is_made_anew_and_the_same(done: Pipeline, settings: dict[str, Any]) -> None:
    run = open_run(settings["census"]["out"])
    for entry in run.folder.store.list("edits/swap/"):
        run.folder.store.delete(entry.key)
    again = pipeline_here(settings)
    assert again.edits["swap"].delta.equal(done.edits["swap"].delta)


def test_an_edit_that_cannot_be_made_is_quarantined_and_the_others_are_measured(
    done: Pipeline, settings: dict[str, Any], tmp_path: Path
) -> None:
    census = settings["census"] | {"out": str(shutil.copytree(settings["census"]["out"], tmp_path / "run"))}
    swap = settings["edits"]["swap"]
    edits = {"swap": swap, "mute": swap | {"prompt": "Is it day or night?", "target": "no concept of the run"}}
    found = pipeline_here(settings | {"census": census, "edits": edits})
    assert list(found.quarantined) == ["mute"]
    assert "names it in none of its own captions" in found.quarantined["mute"]
    assert not found.complete
    assert list(found.evaluations) == ["swap"]
    assert found.measures["swap"] == done.measures["swap"]


def tables_of(out: str) -> dict[str, list[dict[str, Any]]]:
    return {name: open_run(out).table(name).to_pylist() for name in ("edits", "evaluations", "edit_captions")}


def test_edits_of_an_earlier_call_stay_and_are_not_made_again(
    done: Pipeline, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them alone, and one more: rows of the others are as before, each edit has its rows once."""
    out = str(shutil.copytree(settings["census"]["out"], tmp_path / "run"))
    before, gone = tables_of(out), settings["edits"]["gone"]
    asked = settings | {"census": settings["census"] | {"out": out}}
    made: list[str | None] = []

    def spy(material: Any, wishes: Any) -> Any:
        made.append(wishes[0].suppress)
        return make_edit(material, wishes)

    monkeypatch.setattr(editing_job, "make_edit", spy)
    pipeline_here(asked | {"edits": {"more": gone, "swap": settings["edits"]["swap"]}})
    assert made == [gone["suppress"]]
    after = tables_of(out)
    for name, rows in after.items():
        edits = list(dict.fromkeys(row["edit"] for row in rows))
        assert edits == ["gone", "more", "swap"]
        for edit in ("gone", "swap"):
            assert [row for row in rows if row["edit"] == edit] == [row for row in before[name] if row["edit"] == edit]
        assert len([row for row in rows if row["edit"] == "more"]) == len(
            [row for row in rows if row["edit"] == "gone"]
        )
    numbers = snapshots(open_run(out).folder.store)["pipeline"]
    pipeline_here(asked | {"edits": {"more": gone, "swap": settings["edits"]["swap"]}})
    assert snapshots(open_run(out).folder.store)["pipeline"] == numbers


def test_status_tells_when_tables_are_older_than_what_they_are_made_from(
    done: Pipeline, settings: dict[str, Any], tmp_path: Path
) -> None:
    out = str(shutil.copytree(settings["census"]["out"], tmp_path / "run"))
    asked = settings | {"census": settings["census"] | {"out": out}}

    def state() -> tuple[int, str]:
        (found,) = [one for one in analyses(RunFolder.at(out), open_run(out)) if one.name == "pipeline"]
        assert (found.size_done, found.pending, found.renew) == (found.size, 0, "mmray pipeline FILE")
        return found.size, found.tables

    def redo(unit: Path) -> None:
        """Have a unit done again: by another attempt, so that its receipt is another."""
        (unit / "receipts/000000.json").unlink()

    assert state() == (2, "current")
    (evaluation,) = Path(out).glob("edits/gone/evaluation/*/run.json")
    redo(evaluation.parent)
    assert state() == (2, "older than the parts")
    # Rows of an edit that a call does not name are not renewed by it.
    pipeline_here(asked | {"edits": {"swap": settings["edits"]["swap"]}})
    assert state() == (2, "older than the parts")
    pipeline_here(asked)
    assert state() == (2, "current")
    redo(Path(out))
    census_here("demo", "demo", out, limit=64, shard_size=64)
    assert state() == (2, "older than the census")
    pipeline_here(asked)
    assert state() == (2, "current")


def test_a_damaged_table_is_written_anew(done: Pipeline, settings: dict[str, Any], tmp_path: Path) -> None:
    out = str(shutil.copytree(settings["census"]["out"], tmp_path / "run"))
    before = tables_of(out)
    file = max(Path(out).glob("snapshots/pipeline/*/evaluations/*.parquet"))
    file.write_bytes(file.read_bytes()[:-9])
    pipeline_here(settings | {"census": settings["census"] | {"out": out}})
    assert tables_of(out) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"edits": {"x": {"source": "cat"}}}, "edits, x: --source and --target go together"),
        ({"edits": {"x/y": {"suppress": "{known}", **QUICK}}}, "without slashes"),
        ({"edits": {"x": {"suppress": "unheard"}}}, "no concept 'unheard'"),
        ({"evaluation": {"limit": 0}}, "evaluation: setting limit = 0"),
        ({"evaluation": {"data": "demo", "limits": 3}}, "limits"),
        ({"censuses": {}}, "censuses"),
        ({"steps": [{"properties": {"concept": 3}}]}, "steps, properties: unknown setting 'concept'"),
        ({"steps": [{"census": {}}]}, "steps: census: name one of properties, select, selectivity, saliency"),
        ({"steps": [{"select": None, "saliency": None}]}, "steps: saliency, select: name one of"),
        ({"census": {"model": "demo"}}, "data"),
        ({"edits": {"swap": {"suppress": "{known}", **QUICK}}}, "other settings"),
    ],
)
def test_what_is_wrong_is_one_line(
    done: Pipeline, settings: dict[str, Any], concepts: tuple[Path, list[str]], changes: dict[str, Any], said: str
) -> None:
    filled = yaml.safe_load(yaml.safe_dump(changes).replace("{known}", concepts[1][0]))
    with pytest.raises(InputError, match=said) as refused:
        pipeline_here(settings | filled)
    assert "\n" not in str(refused.value)


def test_steps_are_analyses_of_the_run_and_resume(concepts: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, (one, *_) = concepts
    shutil.copytree(out, tmp_path / "run")
    census = {"model": "demo", "data": "demo", "out": str(tmp_path / "run"), "limit": 64, "shard_size": 64}
    chance = {"permutations": 2, "bootstraps": 0}
    steps: list[dict[str, Any]] = [
        {"selectivity": {"by": "domain", **chance}},
        {"selectivity": {"by": "language", **chance}},
        {"select": {"concepts": [one], "k": 2, "samples": 4}},
        {"properties": {"concepts": 1, "images": 2, "maps": 1, "draws": 10, "min_occurrences": 2}},
    ]
    told: list[str] = []
    done = run_pipeline(
        pipeline_settings({"census": census, "steps": steps, "local": True}), lambda step, _: told.append(step)
    )
    # Two neighbours of different kinds run side by side, and are told of together.
    assert list(dict.fromkeys(told)) == ["selectivity", "selectivity 2", "select, properties"]
    assert list(done.steps) == ["selectivity", "selectivity 2", "select", "properties"]
    assert done.complete
    assert {"selectivity", "properties"} <= {name for name in table_schemas() if done.run.optional(name) is not None}
    # What an earlier step has written of the same tables stays.
    assert set(done.run.table("selectivity")["label_kind"].to_pylist()) == {"domain", "language"}
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("shards/*/*.parquet")}
    assert pipeline_here({"census": census, "steps": steps}).complete
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("shards/*/*.parquet")} == parts


def test_the_command_in_this_process(
    mmray: Any, settings: dict[str, Any], done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("Ray is not to be used")

    monkeypatch.setattr("mmray.engine.ray.RayExecutor", refuse)
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    answer = mmray("pipeline", tmp_path / "pipeline.yaml", "--local", "--json")
    assert answer.status == 0, answer.err
    shown = json.loads(answer.out)
    assert shown["evaluations"] == json.loads(json.dumps(done.measures))
    assert shown["quarantined"] == {}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_the_command_on_ray(mmray: Any, settings: dict[str, Any], done: Pipeline, tmp_path: Path) -> None:
    """A pipeline of its own, actors and all, gives what the one without Ray gave."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(settings))
    answer = mmray("pipeline", file, f"census.out={tmp_path / 'run'}", "census.workers=1")
    assert answer.status == 0, answer.err
    for name in ("edits", "evaluations", "edit_captions"):
        found, wanted = (open_run(out).table(name) for out in (tmp_path / "run", settings["census"]["out"]))
        columns = [column for column in found.column_names if column != "seconds"]
        assert found.select(columns).num_rows == wanted.select(columns).num_rows
    assert "next: mmray report" in answer.out
