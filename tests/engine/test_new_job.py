"""A new analysis in one short file gets everything else from the engine; this is the list."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.engine import LocalExecutor, UnitRefusedError, run
from mmray.errors import InputError
from mmray.features import FEATURES, Feature
from mmray.runs import ATTEMPTS, RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.status import analyses
from mmray.runs.sweep import sweep_run
from tests.engine.executors import Watched
from tests.support import words
from tests.support.letters import LINES, counted
from tests.support.words import LetterJob

Letters = Callable[..., LetterJob]


def test_its_declaration_is_short() -> None:
    assert len(Path(words.__file__).read_text().splitlines()) <= 60


def test_tables(letters: Letters) -> None:
    told = []
    result = run(letters(), follow=told.append)
    assert counted(letters()) == {"letter": ["a", "b", "c"], "n": [32, 32, 31]}
    assert (result.done, result.complete, result.headline) == (len(LINES), True, {"letters": 3})
    assert [progress.done for progress in told] == [*range(0, 95, 10), 95, 95]
    assert [progress.phase for progress in told] == ["loading the model", *["working"] * 10, "merging"]


def test_resume(letters: Letters) -> None:
    def stop(_: object) -> None:
        if len(stopped.seen) == 4:
            raise KeyboardInterrupt

    stopped, resumed = Watched(stop), Watched()
    with pytest.raises(KeyboardInterrupt):
        run(letters(), executor=stopped)
    run(letters(), executor=resumed)
    assert (len(stopped.seen), len(resumed.seen)) == (4, 7)
    assert counted(letters())["n"] == [32, 32, 31]


def test_lease(letters: Letters) -> None:
    executor = Watched()
    with drive_analysis(f"{letters().target}/letters"), pytest.raises(InputError, match="another driver is at work"):
        run(letters(), executor=executor)
    assert executor.seen == []


def test_quarantine(letters: Letters) -> None:
    def fail(unit: words.Unit) -> None:
        if "b1" in unit.payload:
            raise RuntimeError("no luck")

    executor = Watched(fail)
    result = run(letters(), executor=executor)
    assert result.quarantined == {0: f"given up after {ATTEMPTS} attempts: RuntimeError: no luck"}
    assert not result.complete
    assert len(executor.seen) == 9 + ATTEMPTS
    assert counted(letters())["n"] == [28, 29, 28]
    # The next call leaves it alone, unless it is asked to try again.
    assert run(letters(), executor=Watched()).quarantined
    assert run(letters(retry_failed=True), executor=LocalExecutor()).complete
    assert counted(letters())["n"] == [32, 32, 31]


def test_settings_are_told_apart(letters: Letters) -> None:
    run(letters())
    after, other = Watched(), Watched()
    run(letters(most=1), executor=after)
    assert (after.seen, counted(letters())["letter"]) == ([], ["a"])
    run(letters(upper=True), executor=other)
    assert (len(other.seen), counted(letters())["letter"]) == (10, ["A", "B", "C"])


TOY = Feature(
    "letters",
    ("tests.support.words:LetterJob",),
    "mmray letters RUN --text FILE",
    ("letters", "total"),
    "lines",
    settings="tests.support.words:LetterSettings",
)
"""Its one line outside its own file."""
COMMAND = f"""
import sys
from mmray.features import FEATURES, Feature
FEATURES["letters"] = {TOY!r}
from mmray.cli import main
try:
    main()
finally:
    if "--help" in sys.argv:
        assert not {{"torch", "ray"}} & set(sys.modules)
"""
"""What `mmray` is once that line is there."""


def mmray(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command line with the toy's line in `mmray.features`."""
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )


def test_help_of_its_command() -> None:
    overview, own = mmray("--help"), mmray("letters", "--help")
    assert (overview.returncode, own.returncode) == (0, 0), overview.stderr + own.stderr
    assert re.search(r"letters +Count how often each letter begins a line of a text file\.", overview.stdout)
    assert re.search(r"Usage: mmray letters \[OPTIONS\] \{?RUN\b", own.stdout)
    for option in ("--text", "--upper", "--most", "--workers", "--retry-failed", "--local", "--json"):
        assert option in own.stdout


@pytest.mark.slow
def test_command(letters: Letters) -> None:
    settings = letters().settings
    words = ("letters", settings.run, "--text", settings.text, "--local")
    first, again = mmray(*words, "--upper"), mmray(*words, "--upper", "--most", 2, "--json")
    assert first.stdout.splitlines()[0] == "letters: 3"
    assert re.fullmatch(rf"95 lines in \d s → {settings.run}", first.stdout.splitlines()[1])
    assert json.loads(again.stdout) | {"seconds": 0} == {
        "job": "letters",
        "done": 95,
        "failures": 0,
        "quarantined": {},
        "seconds": 0,
        "letters": 2,
    }
    assert counted(letters())["letter"] == ["A", "B"]
    assert mmray(*words, "--upper", "--most", 2).stdout.splitlines()[1] == f"95 lines already finished → {settings.run}"
    missing = mmray("letters", settings.run, "--text", "nowhere.txt", "--local")
    assert (missing.returncode, missing.stderr) == (2, "mmray: nowhere.txt: no such file\n")


@pytest.mark.slow
def test_command_resumes_and_its_status_tells_of_quarantine(letters: Letters) -> None:
    def stop(unit: words.Unit) -> None:
        if "b1" in unit.payload:
            raise UnitRefusedError("nothing to count")
        if len(stopped.seen) == 4:
            raise KeyboardInterrupt

    stopped, settings = Watched(stop), letters().settings
    with pytest.raises(KeyboardInterrupt):
        run(letters(), executor=stopped)
    asked = ("letters", settings.run, "--text", settings.text, "--local")
    resumed = mmray(*asked)
    assert (resumed.returncode, resumed.stdout.splitlines()[-1]) == (4, "unit 0 quarantined: nothing to count")
    assert counted(letters())["n"] == [28, 29, 28]
    assert mmray(*asked, "--retry-failed").returncode == 0
    assert counted(letters())["n"] == [32, 32, 31]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """List the toy among the features."""
    monkeypatch.setitem(FEATURES, TOY.name, TOY)


@pytest.mark.usefixtures("listed")
def test_status(letters: Letters) -> None:
    def refuse(unit: words.Unit) -> None:
        if "b1" in unit.payload:
            raise UnitRefusedError("nothing to count")

    run(letters(), executor=Watched(refuse))
    (status,) = analyses(RunFolder.at(letters().target), None)
    assert (status.title, status.noun, status.renew) == (
        "letters",
        "lines",
        f"mmray letters {letters().target} --text FILE",
    )
    assert (status.units, status.units_done, status.pending, status.size_done) == (10, 9, 0, len(LINES))
    assert (status.quarantined, status.tables, status.damage) == ({0: "nothing to count"}, "current", ())


@pytest.mark.usefixtures("listed")
def test_sweep(letters: Letters) -> None:
    parts = run(letters()).parts
    orphan = Path(parts.folder.store.uri, "shards/000001/late-counts.parquet")
    orphan.write_bytes(b"of an attempt that came too late")
    swept = sweep_run(RunFolder.at(letters().target))
    # And what was noted of ten attempts, which nobody needs once their units are committed.
    assert (swept.objects, orphan.exists()) == (1 + 10, False)
    assert run(letters()).parts.receipts == parts.receipts
