"""Where units run: in this process, or on the actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

from mmray.engine.settings import JobSettings
from mmray.engine.units import Answer, UnitRunner, WorkOrder

Work: TypeAlias = tuple[WorkOrder, Sequence[Sequence[int]]]
"""An order with the groups of its units that are to be done."""


class Executor(Protocol):
    """Carries out groups of units and yields an answer per unit as it is done."""

    def session(self) -> AbstractContextManager[None]:
        """Hold what all work needs, such as a connection to a cluster."""

    def answers(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[Answer]]:
        """Yield the answers of all units; each group runs on one worker, in order."""

    def side_by_side(self, work: Sequence[Work]) -> Iterator[Sequence[Answer]]:
        """Yield the answers of several orders, each carried out by workers of its own."""


class LocalExecutor:
    """Runs everything in this process, one unit after the other: for laptops, debuggers and tests."""

    def session(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()

    def answers(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[Answer]]:
        """Yield the answer of each unit."""
        runner = UnitRunner(order)
        for group in groups:
            for number in group:
                yield [runner.run(number)]

    def side_by_side(self, work: Sequence[Work]) -> Iterator[Sequence[Answer]]:
        """Yield the answers of one order after the other: this process is one worker."""
        for order, groups in work:
            yield from self.answers(order, groups)


def executor_for(settings: JobSettings) -> Executor:
    """Return the executor that the settings ask for."""
    if settings.local:
        return LocalExecutor()
    # Imported here: Ray takes two seconds, which a local job need not spend.
    from mmray.engine.ray import RayExecutor

    return RayExecutor(settings.worker_range, settings.gpus_per_worker, settings.address)
