"""How units end that are refused, that hang, or whose worker or answer is lost, and what receipts tell of the work."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmray.engine import LocalExecutor, Progress, Unit, UnitRefusedError, run
from mmray.engine.clock import phase
from mmray.engine.units import Node, UnitOutcome, UnitRunner, WorkOrder
from mmray.errors import InputError, OutageError
from mmray.runs import ATTEMPTS, RunFolder
from mmray.runs.snapshots import newest
from mmray.storage import open_store, retries
from tests.engine.executors import Watched
from tests.support.letters import counted
from tests.support.words import LetterJob

Letters = Callable[..., LetterJob]


def test_a_table_that_is_cut_or_was_not_copied_is_made_again(letters: Letters) -> None:
    run(letters())
    target, whole, again = Path(letters().target), counted(letters()), Watched()
    (target / "tables/letters.parquet").unlink()
    run(letters(), executor=again)
    assert counted(letters()) == whole
    (file,) = target.glob("snapshots/letters/*/letters/*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    (target / "tables/letters.parquet").unlink()
    run(letters(), executor=again)
    assert counted(letters()) == whole
    found = newest(open_store(target), "letters")
    assert found is not None
    assert not list(found.verify(open_store(target)))
    assert not again.seen


def test_a_refused_unit_is_not_tried_again(letters: Letters) -> None:
    def refuse(unit: Unit) -> None:
        if "b1" in unit.payload:
            raise UnitRefusedError("nothing to count")

    executor = Watched(refuse)
    assert run(letters(), executor=executor).quarantined == {0: "nothing to count"}
    assert len(executor.seen) == 10


def test_a_unit_that_hangs_is_quarantined(letters: Letters) -> None:
    def hang(unit: Unit) -> None:
        while "b1" in unit.payload:
            time.sleep(0.01)

    executor = Watched(hang)
    result = run(letters(unit_timeout=0.2), executor=executor)
    assert result.quarantined == {0: f"given up after {ATTEMPTS} attempts: not done after 0.2 s (--unit-timeout)"}
    assert len(executor.seen) == 9 + ATTEMPTS


class Preempted(Node):
    """A node, where others are gone."""

    def __init__(self, lost: Sequence[str], name: str) -> None:
        self.lost, self.name = lost, name

    def is_alive(self, name: str) -> bool:
        return name not in self.lost


@pytest.mark.parametrize("gone", [True, False])
def test_a_worker_that_died_with_its_node_says_nothing_about_the_unit(letters: Letters, gone: bool) -> None:
    names = [f"node {number}" for number in range(ATTEMPTS)]

    class Dying(LocalExecutor):
        def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
            folder = RunFolder.at(order.folders[0])
            for name in names:
                folder.attempt(0, name)
            runner = UnitRunner(order, Preempted(names if gone else [], "the last"))
            yield from ([runner.run(number)] for group in groups for number in group)

    result = run(letters(), executor=Dying())
    assert result.complete == gone
    assert gone or result.quarantined == {0: f"given up after {ATTEMPTS} attempts: the worker died without a word"}


def test_a_worker_that_starts_in_an_outage_waits_for_its_end(letters: Letters, monkeypatch: pytest.MonkeyPatch) -> None:
    outages = iter(["of the folder", "of what the worker loads"])
    opened, made = RunFolder.at, LetterJob.worker

    def unless_down(action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*given: Any) -> Any:
            if (outage := next(outages, None)) is not None:
                raise OutageError(outage)
            return action(*given)

        return act

    def begin(progress: Progress) -> None:
        if not progress.done:
            monkeypatch.setattr(RunFolder, "at", unless_down(opened))
            monkeypatch.setattr(LetterJob, "worker", unless_down(made))

    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))
    assert run(letters(), follow=begin).complete
    assert next(outages, None) is None


def test_receipts_say_where_time_and_memory_went(letters: Letters) -> None:
    def work(_: Unit) -> None:
        with phase("count"):
            time.sleep(0.01)

    receipts = run(letters(), executor=Watched(work)).parts.receipts.values()
    assert all(0.01 <= receipt.phases["count"] <= receipt.seconds for receipt in receipts)
    assert all(receipt.memory["host"] > 1e6 for receipt in receipts)


def test_bad_input_is_told_before_any_work(letters: Letters, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        run(letters(text=str(tmp_path / "gone.txt")))
    with pytest.raises(InputError, match="unknown setting 'uper'"):
        letters(uper=True)
    with pytest.raises(InputError, match="MIN:MAX"):
        letters(workers="4:2")
    assert not Path(letters().target).exists()


def test_a_lost_answer_of_a_worker_is_noticed(letters: Letters) -> None:
    class Losing(LocalExecutor):
        def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
            yield from super().run(order, groups[1:])

    with pytest.raises(InputError, match="1 of 10 units are neither committed nor quarantined"):
        run(letters(), executor=Losing())
    assert not Path(letters().target, "tables").exists()
    assert run(letters()).complete
