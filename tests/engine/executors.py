"""Executors that disturb a job in this process: they watch its units, lose its workers, or remember its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from mmray.engine import LocalExecutor, Unit, UnitResult, Worker
from mmray.engine.units import Answer, UnitRunner, WorkOrder


class Watched(LocalExecutor):
    """Does something before each unit's work, and remembers which units were worked on."""

    def __init__(self, before: Callable[[Unit], None] = lambda _: None) -> None:
        self.before = before
        self.seen: list[Unit] = []

    def answers(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[Answer]]:
        runner = UnitRunner(order)
        runner.workers = [self._watched(worker) for worker in runner.workers]
        yield from ([runner.run(number)] for number in chain(*groups))

    def _watched(self, worker: Worker) -> Worker:
        def work(unit: Unit) -> UnitResult:
            self.seen.append(unit)
            self.before(unit)
            return worker(unit)

        return work
