"""Two threads of one worker: one works on a unit while the other finishes the one before, and neither is confused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmray.engine import LocalExecutor, Unit, UnitResult, run
from mmray.engine.clock import phase
from mmray.engine.units import UnitOutcome, UnitRunner, WorkOrder
from mmray.runs import ATTEMPTS
from tests.support.letters import counted
from tests.support.words import LetterJob

Letters = Callable[..., LetterJob]
WAIT = 20.0


class TwoThreads(LocalExecutor):
    """Does units in two threads, as an actor of a job that overlaps does."""

    def __init__(self, finish: Callable[[Unit], None], work: Callable[[Unit], None] = lambda _: None) -> None:
        self.finish, self.work = finish, work
        self.at_work, self.finishing, self.most = 0, 0, [0, 0]

    def run(self, order: WorkOrder, groups: Any) -> Any:
        runner = UnitRunner(order)
        plain = runner.workers[0]

        def worker(unit: Unit) -> Callable[[], UnitResult]:
            self.at_work += 1
            self.most[0] = max(self.most[0], self.at_work)
            try:
                with phase("work"):
                    self.work(unit)
            finally:
                self.at_work -= 1

            def finish() -> UnitResult:
                self.finishing += 1
                self.most[1] = max(self.most[1], self.finishing)
                try:
                    with phase("end"):
                        self.finish(unit)
                    result = plain(unit)
                    assert isinstance(result, UnitResult)
                    return result
                finally:
                    self.finishing -= 1

            return finish

        runner.workers = [worker]
        with ThreadPoolExecutor(2) as pool:
            outcomes: list[UnitOutcome] = list(pool.map(runner.run, [number for group in groups for number in group]))
        yield outcomes


def test_a_unit_is_finished_while_the_next_is_worked_on(letters: Letters) -> None:
    units, begun, changed = len(letters().plan().units), list[str](), threading.Condition()

    def work(unit: Unit) -> None:
        with changed:
            begun.append(repr(unit))
            changed.notify_all()

    def finish(unit: Unit) -> None:
        # Fails if the next unit waits for the end of this one.
        with changed:
            assert changed.wait_for(lambda: begun[-1] != repr(unit) or len(begun) == units, WAIT)

    executor = TwoThreads(finish, work)
    result = run(letters(), executor=executor)
    assert result.complete
    assert executor.most == [1, 1]
    receipts = result.parts.receipts.values()
    assert all({"work", "end", "commit"} < receipt.phases.keys() for receipt in receipts)
    assert all(receipt.phases["end"] <= receipt.seconds for receipt in receipts)


def test_a_failure_at_the_end_is_that_of_its_own_unit(letters: Letters) -> None:
    whole = counted(letters()) if run(letters()).complete else {}
    other = letters(run=letters().target + "-again")
    bad = repr(other.plan().units[3])
    alone: list[tuple[int, int]] = []

    def finish(unit: Unit) -> None:
        if repr(unit) == bad:
            alone.append((executor.at_work, executor.finishing))
            raise RuntimeError("no luck")

    executor = TwoThreads(finish)
    result = run(other, executor=executor)
    assert result.quarantined == {3: f"given up after {ATTEMPTS} attempts: RuntimeError: no luck"}
    # A second thread would have worked on another unit during the later attempts.
    assert alone[1:] == [(0, 1)] * (ATTEMPTS - 1)
    assert run(letters(run=other.target, retry_failed=True)).complete
    assert counted(letters(run=other.target)) == whole


def test_a_unit_that_lost_its_first_attempt_is_alone(letters: Letters) -> None:
    # A worker that dies holds two units, and its death counts against both.
    lost, seen = repr(letters().plan().units[4]), list[tuple[int, int]]()

    class Died(TwoThreads):
        def run(self, order: WorkOrder, groups: Any) -> Any:
            UnitRunner(order).folders[0].attempt(4)
            yield from super().run(order, groups)

    def look(unit: Unit) -> None:
        if repr(unit) == lost:
            seen.append((executor.at_work, executor.finishing))

    executor = Died(look, look)
    assert run(letters(), executor=executor).complete
    assert seen == [(1, 0), (0, 1)]
