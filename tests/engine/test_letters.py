"""What any job gets from the engine, tried on a toy: resume, quarantine, lease, tables, both executors."""

import time
from pathlib import Path

import pytest

from mmray.engine import LocalExecutor, Unit, UnitRefusedError, checked, run
from mmray.engine.clock import phase
from mmray.engine.units import Node, UnitRunner
from mmray.errors import InputError
from mmray.runs import ATTEMPTS, RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.snapshots import newest
from mmray.storage import open_store
from mmray.tables import read_table
from tests.engine import words
from tests.engine.words import LetterJob, LetterSettings

LINES = [f"{'abc'[n % 3]}{n}" for n in range(95)]


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES))

    def make(**more):
        return checked(
            LetterSettings, {"run": str(tmp_path / "run"), "text": str(tmp_path / "text.txt"), "local": True} | more
        )

    return make


@pytest.fixture
def hook(monkeypatch):
    """Have workers do something before each unit, and return the units that they saw."""
    seen: list[Unit] = []

    def install(action=lambda _: None):
        def before(unit):
            seen.append(unit)
            action(unit)

        monkeypatch.setitem(words.HOOKS, "test", before)
        monkeypatch.setenv("MMRAY_TEST_HOOK", "test")
        return seen

    return install


def table(run):
    return read_table(open_store(run), "letters").to_pydict()


def test_tables_and_headline(settings):
    told = []
    result = run(LetterJob(settings()), follow=told.append)
    assert table(settings().run) == {"letter": ["a", "b", "c"], "n": [32, 32, 31]}
    assert (result.done, result.failures, result.complete, result.headline) == (95, 0, True, {"letters": 3})
    assert [progress.done for progress in told] == [*range(0, 95, 10), 95]


def test_a_second_call_does_nothing(settings, hook):
    run(LetterJob(settings()))
    seen = hook()
    run(LetterJob(settings()))
    assert seen == []


def test_a_table_that_is_cut_or_was_not_copied_is_made_again(settings, hook):
    run(LetterJob(settings()))
    seen = hook()
    target = Path(settings().run)
    whole = table(settings().run)
    (target / "tables/letters.parquet").unlink()
    run(LetterJob(settings()))
    assert table(settings().run) == whole
    (file,) = target.glob("snapshots/letters/*/letters/*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    (target / "tables/letters.parquet").unlink()
    run(LetterJob(settings()))
    assert table(settings().run) == whole
    assert not list(newest(open_store(target), "letters").verify(open_store(target)))
    assert not seen


def test_a_stopped_job_goes_on(settings, hook):
    def stop(unit):
        if len(seen) == 4:
            raise KeyboardInterrupt

    seen = hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(LetterJob(settings()))
    run(LetterJob(settings()))
    assert len(seen) == 4 + 7
    assert table(settings().run)["n"] == [32, 32, 31]


def test_what_comes_after_the_work_needs_no_work(settings, hook):
    run(LetterJob(settings()))
    seen = hook()
    run(LetterJob(settings(most=1)))
    assert seen == []
    assert table(settings().run)["letter"] == ["a"]


def test_other_settings_are_other_work(settings, hook):
    run(LetterJob(settings()))
    seen = hook()
    run(LetterJob(settings(upper=True)))
    assert len(seen) == 10
    assert table(settings().run)["letter"] == ["A", "B", "C"]


def test_the_third_failure_quarantines_a_unit(settings, hook):
    def fail(unit):
        if "b1" in unit.payload:
            raise RuntimeError("no luck")

    seen = hook(fail)
    result = run(LetterJob(settings()))
    assert result.quarantined == {0: f"given up after {ATTEMPTS} attempts: RuntimeError: no luck"}
    assert not result.complete
    assert len(seen) == 9 + ATTEMPTS
    seen.clear()
    assert run(LetterJob(settings())).quarantined
    assert seen == []
    hook()
    assert run(LetterJob(settings(retry_failed=True))).complete
    assert table(settings().run)["n"] == [32, 32, 31]


def test_a_refused_unit_is_not_tried_again(settings, hook):
    def refuse(unit):
        if "b1" in unit.payload:
            raise UnitRefusedError("nothing to count")

    seen = hook(refuse)
    assert run(LetterJob(settings())).quarantined == {0: "nothing to count"}
    assert len(seen) == 10


def test_a_unit_that_hangs_is_quarantined(settings, hook):
    def hang(unit):
        while "b1" in unit.payload:
            time.sleep(0.01)

    seen = hook(hang)
    result = run(LetterJob(settings(unit_timeout=1.0)))
    assert result.quarantined == {0: f"given up after {ATTEMPTS} attempts: not done after 1.0 s (--unit-timeout)"}
    assert len(seen) == 9 + ATTEMPTS


class Preempted(Node):
    """A node on which a worker dies without a word at one unit, and that is gone then."""

    def __init__(self, lost, name):
        self.lost, self.name = lost, name

    def is_alive(self, name):
        return name not in self.lost


@pytest.mark.parametrize("gone", [True, False])
def test_a_worker_that_died_with_its_node_says_nothing_about_the_unit(settings, gone):
    """Three deaths without a word quarantine a unit, unless they were the deaths of nodes."""
    names = [f"node {number}" for number in range(ATTEMPTS)]

    class Dying(LocalExecutor):
        def answers(self, order, groups):
            folder = RunFolder.at(order.folders[0])
            for name in names:
                folder.attempt(0, name)
            runner = UnitRunner(order, Preempted(names if gone else [], "the last"))
            yield from ([runner.run(number)] for group in groups for number in group)

    result = run(LetterJob(settings()), executor=Dying())
    assert result.complete == gone
    assert gone or result.quarantined == {0: f"given up after {ATTEMPTS} attempts: the worker died without a word"}


def test_receipts_say_where_time_and_memory_went(settings, hook):
    def work(unit):
        with phase("count"):
            time.sleep(0.01)

    hook(work)
    receipts = run(LetterJob(settings())).parts.receipts.values()
    assert all(0.01 <= receipt.phases["count"] <= receipt.seconds for receipt in receipts)
    assert all(receipt.memory["host"] > 1e6 for receipt in receipts)


def test_a_second_driver_is_refused(settings, hook):
    seen = hook()
    with (
        drive_analysis(f"{settings().run}/letters"),
        pytest.raises(InputError, match="another driver is at work"),
    ):
        run(LetterJob(settings()))
    assert seen == []


def test_bad_input_is_told_before_any_work(settings, hook, tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        run(LetterJob(settings(text=str(tmp_path / "gone.txt"))))
    with pytest.raises(InputError, match="unknown setting 'uper'"):
        settings(uper=True)
    with pytest.raises(InputError, match="MIN:MAX"):
        settings(workers="4:2")


def test_a_missing_receipt_is_noticed(settings, monkeypatch):
    """An executor that loses an answer, and its commit, ends the job rather than leaving rows out."""

    class Losing(LocalExecutor):
        def answers(self, order, groups):
            yield from super().answers(order, groups[1:])

    with pytest.raises(InputError, match="1 of 10 units are neither committed nor quarantined"):
        run(LetterJob(settings()), executor=Losing())
    assert not Path(settings().run, "tables").exists()
    assert run(LetterJob(settings())).complete


@pytest.mark.slow
def test_ray_gives_the_same_tables(settings, tmp_path, ray_here):
    run(LetterJob(settings()))
    other = settings(local=False, workers="1:2", run=str(tmp_path / "other"))
    result = run(LetterJob(other))
    assert result.complete
    assert table(other.run) == table(settings().run)
