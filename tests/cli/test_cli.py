"""The command line as people meet it: help, one line for bad input, exit statuses, JSON."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.demo import DATA
from mmray.features.census.tables import TABLES
from mmray.runs.run import Run
from tests.support.command import Answer
from tests.support.scenes import bad_samples, scenes, write

Mmray = Callable[..., Answer]


def bad_census(folder: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Return by name what is changed in a good census, and what the one line has to say."""
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "vit"}')
    (folder / "model" / "model.safetensors").touch()
    pq.write_table(pa.table({"a": [1]}), folder / "columns.parquet")
    pq.write_table(pq.read_table(DATA).slice(0, 0), folder / "nothing.parquet")
    return {
        "missing data": ({"data": folder / "none.parquet"}, "none.parquet: no such file or folder; check the path"),
        "empty folder": ({"data": folder / "empty"}, "empty: no files there; check the path"),
        "no rows": ({"data": folder / "nothing.parquet"}, "nothing.parquet: has no samples"),
        "missing column": ({"data": folder / "columns.parquet"}, "--image-column NAME --caption-column NAME"),
        "column of another name": ({"caption-column": "text"}, "has no column 'text'; it has sample_id"),
        "not a model": ({"model": folder / "empty"}, "empty: not a model folder (no config.json)"),
        "another kind of model": ({"model": folder / "model"}, "not a vision-language or causal language model"),
        "no such model": ({"model": "./nowhere"}, "./nowhere: no such model folder"),
        "out is below a file": ({"out": folder / "file" / "run"}, "file/run: can't write here (Not a directory)"),
        "out of another kind": ({"out": "gs://bucket/run"}, "scheme 'gs' is not supported; use a local path or s3://"),
        "bad lexicon": (
            {"nouns": folder / "none.txt"},
            "none.txt: no such file; give objects, hanta, textblob, auto or",
        ),
        "zero": ({"shard-size": 0}, "shard_size = 0: Input should be greater than or equal to 1"),
        "no number": ({"top-k": "many"}, "Invalid value for '--top-k'"),
        "no choice": ({"score": "best"}, "'best' is not one of 'contribution'"),
        "no option": ({"shardsize": 5}, "No such option: --shardsize"),
        "no cluster": ({"address": "127.0.0.1:1"}, "--address 127.0.0.1:1: no Ray cluster there"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing data",
        "empty folder",
        "no rows",
        "missing column",
        "column of another name",
        "not a model",
        "another kind of model",
        "no such model",
        "out is below a file",
        "out of another kind",
        "bad lexicon",
        "zero",
        "no number",
        "no choice",
        "no option",
        "no cluster",
    ],
)
def test_bad_input_is_one_line_and_status_2(
    mmray: Mmray, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray would be kept
    change, said = bad_census(tmp_path)[name]
    good = {"model": "demo", "data": write(tmp_path / "data.parquet", scenes(2)), "out": tmp_path / "run"}
    options = [str(part) for key, value in (good | change).items() for part in (f"--{key}", value)]
    assert said in mmray("census", *options).refusal
    # What is wrong before any work leaves no run behind.
    if name != "no cluster":
        assert not (tmp_path / "run").exists()


def test_every_bad_input_is_tested(tmp_path: Path) -> None:
    (marks,) = test_bad_input_is_one_line_and_status_2.pytestmark  # type: ignore[attr-defined]
    assert list(bad_census(tmp_path)) == marks.args[1]


@pytest.mark.parametrize("command", ["census", "rank", "neuron", "status", "check-model"])
def test_missing_arguments(mmray: Mmray, command: str) -> None:
    assert re.match(r"Missing (argument|option) '.+'; see mmray ", mmray(command).refusal)


@pytest.mark.parametrize("arguments", [["status"], ["rank", "dog"], ["neuron", "L0.u0"]])
@pytest.mark.parametrize("where", ["empty", "none", "file", "s3:/bucket"])
def test_folders_without_a_run(mmray: Mmray, tmp_path: Path, where: str, arguments: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    uri = where if where.startswith("s3") else tmp_path / where
    said = "no bucket; write s3://BUCKET/PREFIX" if where.startswith("s3") else "no run here (no run.json)"
    assert f"{uri}: {said}" in mmray(arguments[0], uri, *arguments[1:]).refusal


def test_an_unknown_concept_names_near_ones(mmray: Mmray, run: Run) -> None:
    concept = max(run.concepts, key=len)
    assert concept in mmray("rank", run.uri, concept[:-1] + "q").refusal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["neuron", "L0u3"], "'L0u3' is not a neuron; write layer and unit as L7.u89"),
        (["neuron", "L99.u3"], "L99.u3 is outside the model: 2 layers"),
        (["rank", "dog", "--by", "rank"], "unknown order 'rank'; choose from score, specific, selective, share"),
        (["rank", "dog", "--k", "0"], "Invalid value for '--k'"),
    ],
)
def test_bad_questions_to_a_run(mmray: Mmray, run: Run, arguments: list[str], said: str) -> None:
    assert said in mmray(arguments[0], run.uri, *arguments[1:]).refusal


def test_other_settings_on_a_run_are_refused(mmray: Mmray, run: Run) -> None:
    asked = ["--model", run.info["settings"]["model"], "--data", run.info["settings"]["data"], "--out", run.uri]
    refusal = mmray("census", "--local", *asked, "--shard-size", 10, "--top-k", 6, "--fold-norm").refusal
    assert "(fold_norm was False, now True; top_k was 5, now 6); choose another OUT" in refusal
    assert mmray("census", "--local", *asked, "--shard-size", 10, "--top-k", 5).status == 4


def test_bad_samples_are_rows_and_status_4(mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    rows = bad_samples()
    out = tmp_path / ("a rather long name, so that paths have to be kept whole " * 2).strip().replace(" ", "-")
    arguments = ["--model", tiny("llava"), "--data", write(tmp_path / "data.parquet", rows), "--out", out]
    answer = mmray("census", "--local", *arguments)
    assert answer.status == 4
    assert f"12 samples in {answer.out.split()[3]} s → {out}\n" in answer.out
    assert "1 of 12 captions has no noun; see --nouns\n" in answer.out
    assert f"2 samples failed; see: mmray status {out}\n" in answer.out
    assert answer.out.endswith(f"next: mmray rank {out} · mmray status {out}\n")
    errors = pq.read_table(out / "tables" / "errors.parquet").to_pylist()
    stages = {row["sample_id"]: row["stage"] for row in errors}
    assert stages == {rows[0]["sample_id"]: "decode", rows[1]["sample_id"]: "read"}
    assert all(row["message"] and row["source"].startswith("data.parquet#") for row in errors)
    status = mmray("status", out)
    assert status.status == 0
    assert all(row["message"][:20] in status.out for row in errors)


def test_a_shard_quarantined_is_named(
    mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmray.features.census.shard import ShardAnalysis

    def run(*_: object) -> None:
        raise ValueError("[red]never")

    monkeypatch.setattr(ShardAnalysis, "collect", run)
    arguments = [
        "--model",
        tiny("llava"),
        "--data",
        write(tmp_path / "data.parquet", scenes(2)),
        "--out",
        tmp_path / "r",
    ]
    answer = mmray("census", "--local", *arguments)
    assert answer.status == 4
    assert "shard 0 quarantined: given up after 3 attempts: ValueError: [red]never" in answer.out
    monkeypatch.undo()
    assert "1 quarantined of 1" in mmray("status", tmp_path / "r").out


def test_an_interrupted_census_says_how_to_go_on(
    mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmray.features.census.shard import ShardAnalysis

    analyse = ShardAnalysis.collect

    def interrupt(self: ShardAnalysis, samples: object) -> object:
        if self.shard_id == 1:
            raise KeyboardInterrupt
        return analyse(self, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardAnalysis, "collect", interrupt)
    data, out = write(tmp_path / "data.parquet", scenes(6)), tmp_path / "run"
    arguments = ["census", "--local", "--model", tiny("llava"), "--data", data, "--out", out, "--shard-size", 2]
    answer = mmray(*arguments)
    assert (answer.status, answer.out) == (130, "")
    assert answer.err.endswith(f"mmray: stopped; run the same command again to resume {out}\n")
    assert "1 done, 2 pending" in mmray("status", out).out
    monkeypatch.setattr(ShardAnalysis, "collect", analyse)
    assert mmray(*arguments).status == 0
    assert "3 done, 0 pending" in mmray("status", out).out


def test_json_of_a_census(mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [
        "--model",
        tiny("llava"),
        "--data",
        write(tmp_path / "data.parquet", scenes(4)),
        "--out",
        tmp_path / "r",
    ]
    answer = mmray("census", "--local", *arguments, "--json")
    assert answer.status == 0
    outcome = json.loads(answer.out)
    counts = {"out", "samples", "analysed", "occurrences", "failures", "skipped"}
    assert set(outcome) == {*counts, "quarantined", "seconds", "already"}
    assert (outcome["samples"], outcome["failures"], outcome["quarantined"]) == (4, 0, {})
    assert outcome["occurrences"] >= 4


def test_json_of_what_is_read(mmray: Mmray, run: Run) -> None:
    status = json.loads(mmray("status", run.uri, "--json").out)
    assert (status["samples_done"], status["failures"], status["finished"], status["pending"]) == (24, 2, True, 0)
    assert set(status["first_failures"][0]) == set(TABLES["errors"].names)
    concept = next(iter(run.concepts))
    for by in ("score", "specific", "selective", "share"):
        ranked = json.loads(mmray("rank", run.uri, concept, "--k", 3, "--by", by, "--json").out)
        assert ranked == run.rank(concept, 3, by).to_pylist()
        assert set(ranked[0]) == set(TABLES["rankings"].names)
    facts = json.loads(mmray("neuron", run.uri, ranked[0]["neuron"], "--json").out)
    assert set(facts) == {*TABLES["neurons"].names, "concepts", "examples"}
    assert {row["sign"] for row in facts["examples"]} == {1, -1}


def test_tables_are_shown_without_markup(mmray: Mmray, run: Run) -> None:
    concept = next(iter(run.concepts))
    answer = mmray("rank", run.uri, concept, "--k", 3)
    assert (answer.status, answer.err) == (0, "")
    assert all(name in answer.out for name in run.rank(concept, 3)["neuron"].to_pylist())
    answer = mmray("neuron", run.uri, "L0.u0")
    assert (answer.status, answer.err) == (0, "")
    assert "highest" in answer.out


@pytest.mark.slow
def test_neurons_are_chosen_together(mmray: Mmray, run: Run) -> None:
    first, second, *_ = run.concepts
    answer = mmray("select", run.uri, first.upper(), second, "--k", 7, "--samples", 12, "--local", "--json")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert [selection["concept"] for selection in found] == [first, second]
    for selection in found:
        names = [row["neuron"] for row in selection["neurons"]]
        assert len(set(names)) == 7
        assert set(names) <= set(run.rank(selection["concept"], 10_000)["neuron"].to_pylist())
        assert selection["own"] > selection["others"]
        assert selection["own_places"] == run.concepts[selection["concept"]]
        assert selection["other_places"] > 5
    again = json.loads(mmray("select", run.uri, second, "--k", 7, "--samples", 24, "--local", "--json").out)
    assert again[0]["other_places"] > found[1]["other_places"]
    shown = mmray("select", run.uri, first, "--k", 3, "--samples", 12, "--local")
    assert re.search(rf"ablated together, to first order: {first} falls by", shown.out)
    assert "no concept 'nothing'" in mmray("select", run.uri, "nothing").refusal


def test_plan_runs_nothing(mmray: Mmray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = mmray("plan", "--model", "demo", "--data", "demo", "--json")
    assert answer.status == 0, answer.err
    plan = json.loads(answer.out)
    assert (plan["samples"], plan["shards"]) == (1536, 4)
    assert plan["hours"] > 0
    assert (plan["sample"]["rows"], plan["sample"]["unreadable"], plan["warnings"]) == (64, 0, [])
    shown = mmray("plan", "--model", "demo", "--data", "demo", "--out", "run", "--limit", 100, "--shard-size", 30)
    assert re.search(r"samples +100,", shown.out)
    assert re.search(r"shards +4\n", shown.out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(run: Run) -> None:
    concept = next(iter(run.concepts))
    # The reader is gone before anything is written, and once the pipe is full.
    for k, reader in ((1, "true"), (2000, "head -c 1")):
        command = f"{sys.executable} -m mmray rank {shlex.quote(run.uri)} {concept} --k {k} --json | {reader}"
        answer = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert (answer.returncode, answer.stderr) == (0, "")


def test_the_console_script_is_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("mmray")
    answer = subprocess.run([script, "status", tmp_path], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr == f"mmray: {tmp_path}: no run here (no run.json); give a folder that mmray census wrote\n"
