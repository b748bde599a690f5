"""A new analysis in one short file gets everything else from the engine; this is the list."""

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
from tests.engine import words
from tests.engine.conftest import LINES, counted
from tests.engine.executors import Watched
from tests.engine.words import LetterJob

Letters = Callable[..., LetterJob]


def test_its_declaration_is_short() -> None:
    assert len(Path(words.__file__).read_text().splitlines()) <= 60


def test_tables(letters: Letters) -> None:
    told = []
    result = run(letters(), follow=told.append)
    assert counted(letters()) == {"letter": ["a", "b", "c"], "n": [32, 32, 31]}
    assert (result.done, result.complete, result.headline) == (len(LINES), True, {"letters": 3})
    assert [progress.done for progress in told] == [*range(0, 95, 10), 95]


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


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """List the toy among the features: its one line outside its own file."""
    toy = Feature("letters", ("tests.engine.words:LetterJob",), "mmray letters RUN", ("letters", "total"), "lines")
    monkeypatch.setitem(FEATURES, toy.name, toy)


@pytest.mark.usefixtures("listed")
def test_status(letters: Letters) -> None:
    def refuse(unit: words.Unit) -> None:
        if "b1" in unit.payload:
            raise UnitRefusedError("nothing to count")

    run(letters(), executor=Watched(refuse))
    (status,) = analyses(RunFolder.at(letters().target), None)
    assert (status.title, status.noun, status.renew) == ("letters", "lines", f"mmray letters {letters().target}")
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


# What it does not get yet is a command line: commands are modules of `mmray.cli`, and not made of FEATURES.
