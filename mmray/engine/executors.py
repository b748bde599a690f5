"""Executors: run units in this process, or on the actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

from mmray.engine.settings import JobSettings
from mmray.engine.units import UnitOutcome, UnitRunner, WorkOrder

Work: TypeAlias = tuple[WorkOrder, Sequence[Sequence[int]]]
"""A work order and the groups of its pending units."""


class Executor(Protocol):
    """Runs groups of units."""

    def session(self) -> AbstractContextManager[None]:
        """Hold what all work needs, such as the connection to a cluster."""

    def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
        """Yield the outcomes of units as they finish; each group runs on one worker, in order."""

    def run_side_by_side(self, work: Sequence[Work]) -> Iterator[Sequence[UnitOutcome]]:
        """Yield the outcomes of several work orders, each of which has workers of its own."""


class LocalExecutor:
    """Runs all units in this process, one after the other; for laptops, debuggers and tests."""

    def session(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()

    def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
        """Yield the outcome of each unit."""
        runner = UnitRunner(order)
        for group in groups:
            for number in group:
                # One by one, so that progress and the lease are looked at after every unit.
                yield [runner.run(number)]

    def run_side_by_side(self, work: Sequence[Work]) -> Iterator[Sequence[UnitOutcome]]:
        """Yield the outcomes of one order after the other, because this process is a single worker."""
        for order, groups in work:
            yield from self.run(order, groups)


def executor_for(settings: JobSettings) -> Executor:
    """Return the executor that the settings ask for."""
    if settings.local:
        return LocalExecutor()
    # Importing Ray takes two seconds, which a local job doesn't need.
    from mmray.engine.ray import RayExecutor

    return RayExecutor(settings.worker_range, settings.gpus_per_worker, settings.address)
