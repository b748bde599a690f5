"""What standard output takes: any encoding, a pipe's whole lines; and the small questions that every tool answers."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pytest

from mmray.cli import main
from mmray.runs.run import Run, open_run
from mmray.version import VERSION
from tests.support.command import Answer
from tests.support.local_jobs import write_table

Mmray = Callable[..., Answer]
WORDS = ["锤子", "naïve", "😀", "a→b", "молоток", "reconnaissance"]


@pytest.fixture
def worded(run: Run, tmp_path: Path) -> Run:
    """Return a copy of the run whose neurons write words of many scripts."""
    import shutil

    shutil.copytree(run.uri, tmp_path / "run")
    for name in ("rankings", "neurons"):
        table = run.table(name)
        for column in {"tokens", "suppressed"} & set(table.column_names):
            words = pa.array([WORDS] * len(table), pa.list_(pa.string()))
            table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), words)
        write_table(tmp_path / "run", name, table)
    return open_run(tmp_path / "run")


def called(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "PYTHONIOENCODING")}
    command = [sys.executable, "-m", "mmray", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=kept | environment, check=False)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Return what runs a command with stdout of an encoding, and returns what it printed."""
    # Lines are whole where no width is known.
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(encoding: str, *arguments: str) -> bytes:
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
        with pytest.raises(SystemExit) as ended:
            main(lambda: list(arguments))
        assert not ended.value.code
        return out.getvalue()

    return call


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding_takes_every_word(
    worded: Run, printed: Callable[..., bytes], encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    concept = next(iter(worded.concepts))
    text = printed(encoding, "rank", worded.uri, concept).decode(encoding)
    for word in WORDS:
        # A word is whole, or escaped: never a question mark.
        assert word in text or json.dumps(word)[1:-1] in text.replace("\xef", "\\u00ef")
    exact = printed(encoding, "rank", worded.uri, concept, "--json")
    assert json.loads(exact.decode(encoding)) == worded.rank(concept).to_pylist()
    for command in (["neuron", worded.uri, "L0.u0"], ["status", worded.uri], ["rank", worded.uri]):
        assert printed(encoding, *command)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_what_is_piped_is_not_cut(worded: Run) -> None:
    concept = next(iter(worded.concepts))
    *lines, last = called("rank", worded.uri, concept, PYTHONIOENCODING="utf-8").stdout.decode().splitlines()
    assert all(line.split()[-6:] == WORDS for line in lines[2:])
    assert last.startswith("next: mmray neuron")
    captions = called("neuron", worded.uri, "L0.u0", PYTHONIOENCODING="utf-8").stdout.decode()
    assert "…" not in captions
    facts = worded.neuron("L0.u0")
    assert all(row["caption"] in captions for row in facts["examples"])
    # Who says how wide it is to be is obeyed.
    narrow = called("rank", worded.uri, concept, PYTHONIOENCODING="utf-8", COLUMNS="60").stdout.decode()
    assert max(map(len, narrow.splitlines()[2:-1])) <= 60


def test_the_version(mmray: Mmray) -> None:
    answer = mmray("--version")
    assert (answer.status, answer.out, answer.err) == (0, f"mmray {VERSION}\n", "")


@pytest.mark.parametrize("command", [[], ["rank"], ["census"]])
def test_help_is_short_for_help(mmray: Mmray, command: list[str]) -> None:
    short, long = mmray(*command, "-h"), mmray(*command, "--help")
    assert short.status == 0
    assert short.out == long.out


def test_the_package_has_types() -> None:
    assert (files("mmray") / "py.typed").is_file()


def test_rank_without_a_concept_lists_them(mmray: Mmray, run: Run) -> None:
    found = json.loads(mmray("rank", run.uri, "--json").out)
    assert {row["concept"]: row["occurrences"] for row in found} == run.concepts
    assert [row["occurrences"] for row in found] == sorted(run.concepts.values(), reverse=True)
    images = run.sql(
        "select concept, count(distinct image) as images from occurrences join captions using (sample_id) "
        "group by concept"
    ).to_pylist()
    assert {row["concept"]: row["images"] for row in found} == {row["concept"]: row["images"] for row in images}
    for by in ("score", "specific", "share"):
        listed = json.loads(mmray("rank", run.uri, "--by", by, "--json").out)
        for row in listed[:5]:
            assert row["neuron"] == run.rank(row["concept"], 1, by)["neuron"][0].as_py()
    shown = mmray("rank", run.uri, "--k", 2)
    first, second, *rest = run.concepts
    assert shown.status == 0
    assert shown.out.splitlines()[0].split() == ["concept", "occurrences", "images", "highest", "neuron"]
    assert [line.split()[0] for line in shown.out.splitlines()[1:3]] == [first, second]
    assert shown.out.splitlines()[3] == f"and {len(rest)} more"
    assert "unknown order 'rank'; choose from" in mmray("rank", run.uri, "--by", "rank").refusal
