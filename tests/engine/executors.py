"""Executors that disturb a job in this process: they watch its units, lose its workers, or remember its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeAlias

from mmray.engine import Job, LocalExecutor, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.engine.job import finished
from mmray.engine.units import UnitOutcome, UnitRunner, WorkOrder
from mmray.runs import RunFolder
from tests.engine.disturbed import Change, Disturbed
from tests.support.stores import Killed

Results: TypeAlias = dict[tuple[str, str, str], UnitResult]
"""Job, settings, unit → what came of it."""


class Watched(LocalExecutor):
    """Does something before each unit's work, and remembers which units were worked on."""

    def __init__(self, before: Callable[[Unit], None] = lambda _: None) -> None:
        self.before = before
        self.seen: list[Unit] = []

    def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
        runner = self.runner(order)
        runner.workers = [self._watched(worker) for worker in runner.workers]
        yield from ([runner.run(number)] for number in chain(*groups))

    def runner(self, order: WorkOrder) -> UnitRunner:
        """Return what does the units."""
        return UnitRunner(order)

    def _watched(self, worker: Worker) -> Worker:
        def work(unit: Unit) -> UnitResult | Callable[[], UnitResult]:
            self.seen.append(unit)
            self.before(unit)
            return worker(unit)

        return work


class Remembered(Watched):
    """Commits what an earlier run of the same job made of a unit; a job's workers load nothing then.

    What a unit gives depends on its job's settings and on its number, so that is what it is remembered by.
    """

    results: Results

    def __init__(self, results: Results, before: Callable[[Unit], None] = lambda _: None):
        super().__init__(before)
        self.results = results

    def runner(self, order: WorkOrder) -> UnitRunner:
        return UnitRunner(replace(order, jobs=[_RememberedJob(job, self.results) for job in order.jobs]))


class _RememberedJob(Job[Any, Any]):
    """A job whose worker is loaded for units alone that nobody remembers."""

    def __init__(self, job: Job[Any, Any], results: Results) -> None:
        super().__init__(job.settings)
        self.job = job
        self.results = results

    @property
    def target(self) -> str:
        return self.job.target

    def plan(self) -> Plan[Any]:
        return self.job.plan()

    def merge(self, plan: Plan[Any], parts: Parts, output: Output) -> dict[str, Any]:
        return self.job.merge(plan, parts, output)

    def worker(self, context: Any) -> Worker:
        workers: list[Worker] = []

        def work(unit: Unit) -> UnitResult:
            key = (type(self.job).__name__, self.job.settings.fingerprint({}), repr((unit.payload, unit.group)))
            if key not in self.results:
                if not workers:
                    workers.extend(type(self.job).workers([self.job], [context]))
                self.results[key] = finished(workers[0](unit))
            return self.results[key]

        return work


class DyingWorkers(Remembered):
    """Its first worker's stores are disturbed; where that kills it, another takes its place, as on Ray."""

    def __init__(self, results: Results, around: Callable[[Change], Any]) -> None:
        super().__init__(results)
        self.around = around
        self.killed = 0

    def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
        runner = self.runner(order)
        runner.folders = [RunFolder(Disturbed(folder.store, self.around)) for folder in runner.folders]
        for number in chain(*groups):
            try:
                answer = runner.run(number)
            except Killed:
                self.killed += 1
                runner = self.runner(order)
                answer = runner.run(number)
            yield [answer]
