"""The command line as people meet it: help, one line for bad input, exit statuses, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.demo import DATA
from mmray.tables import SCHEMAS

BAD = (
    "missing data",
    "empty folder",
    "missing column",
    "not a model",
    "no such model",
    "out is below a file",
    "no run",
    "bad lexicon",
    "bad value",
)
COMMANDS = ("census", "plan", "status", "rank", "neuron", "check-model", "demo")


def mmray(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmray", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def scenes(count: int) -> list[dict[str, object]]:
    # Objects have English names, and no concepts.json that translates them lies beside data written here.
    return [row for row in pq.read_table(DATA).slice(0, 8 * count).to_pylist() if row["language"] == "en"][:count]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), path)
    return str(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    answer = mmray(command, "--help")
    assert answer.returncode == 0
    assert "Usage" in answer.stdout


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return by name a command line and what its one line has to say."""
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    data = write(folder / "data.parquet", scenes(2))
    pq.write_table(pa.table({"a": [1]}), folder / "columns.parquet")
    out = str(folder / "run")
    census = ["census", "--model", "demo", "--data", data, "--out", out]

    def change(flag: str, value: str) -> list[str]:
        place = census.index(flag) + 1
        return [*census[:place], value, *census[place + 1 :]]

    return {
        "missing data": (change("--data", str(folder / "none.parquet")), "none.parquet"),
        "empty folder": (change("--data", str(folder / "empty")), "empty"),
        "missing column": (change("--data", str(folder / "columns.parquet")), "--caption-column"),
        "not a model": (change("--model", str(folder / "empty")), "config.json"),
        "no such model": (change("--model", "./nowhere"), "no such model"),
        "out is below a file": (change("--out", str(folder / "file" / "run")), "can't write"),
        "no run": (["rank", str(folder / "empty"), "dog"], "no run"),
        "bad lexicon": ([*census, "--nouns", str(folder / "none.txt")], "no such file"),
        "bad value": ([*census, "--shard-size", "0"], "shard_size"),
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(name: str, tmp_path: Path) -> None:
    arguments, said = bad_inputs(tmp_path)[name]
    answer = mmray(*arguments)
    assert answer.returncode == 2, answer.stderr
    assert said in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_bad_samples_are_rows_and_status_4(tmp_path: Path) -> None:
    rows = scenes(12)
    rows[0]["image"] = {"bytes": b"no picture", "path": None}
    rows[1]["caption"] = ""
    rows[2]["caption"] = "Nothing of note."
    data, out = write(tmp_path / "data.parquet", rows), str(tmp_path / "run")
    answer = mmray("census", "--model", "demo", "--data", data, "--out", out, "--workers", "1", "--json")
    assert answer.returncode == 4, answer.stderr
    assert json.loads(answer.stdout)["failures"] == 3
    tables = Path(out) / "tables"
    stages = {row["sample_id"]: row["stage"] for row in pq.read_table(tables / "errors.parquet").to_pylist()}
    assert stages == {rows[0]["sample_id"]: "decode", rows[1]["sample_id"]: "read", rows[2]["sample_id"]: "nouns"}
    for name, schema in SCHEMAS.items():
        assert pq.read_table(tables / f"{name}.parquet").schema.names == schema.names, name
    status = json.loads(mmray("status", out, "--json").stdout)
    assert (status["samples_done"], status["failures"], status["finished"]) == (12, 3, True)
    concept = pq.read_table(tables / "rankings.parquet")["concept"][0].as_py()
    ranked = json.loads(mmray("rank", out, concept, "--k", "3", "--json").stdout)
    assert [row["rank"] for row in ranked] == [1, 2, 3]
    assert set(ranked[0]) == set(SCHEMAS["rankings"].names)
    facts = json.loads(mmray("neuron", out, ranked[0]["neuron"], "--json").stdout)
    assert facts["neuron"] == ranked[0]["neuron"]
    assert {row["sign"] for row in facts["examples"]} == {1, -1}


def test_plan_runs_nothing(tmp_path: Path) -> None:
    answer = mmray("plan", "--model", "demo", "--data", "demo", "--out", str(tmp_path / "run"), "--json")
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert (plan["samples"], plan["shards"]) == (1536, 4)
    assert plan["hours"] > 0
    assert not (tmp_path / "run").exists()


def test_reading_needs_neither_torch_nor_ray() -> None:
    code = "import mmray.results.run, mmray.results.terminal, sys; print({'torch', 'ray'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
