"""Units of work carried out over a pool of actors: those not committed yet are handed out, and progress is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import ray.data

from mmray.cluster.census import Progress
from mmray.cluster.session import Pool, actor_pool, machines, ray_session
from mmray.errors import InputError
from mmray.runs import RunFolder


class Execution(Protocol):
    """Settings that say how work is done."""

    @property
    def workers(self) -> int | None:
        """Actors."""

    @property
    def gpus_per_worker(self) -> float | None:
        """GPUs of each."""

    @property
    def address(self) -> str | None:
        """The Ray cluster to join."""

    @property
    def retry_failed(self) -> bool:
        """Try units again that were set aside."""


def carry_out(
    folder: RunFolder,
    samples: Sequence[int],
    execution: Execution,
    start: Callable[[list[int], Pool], ray.data.Dataset],
    follow: Callable[[Progress], None],
) -> None:
    """Have every unit of a folder that is neither committed nor set aside done; `samples` has the size of each unit.

    `start` hands units to actors. Raises InputError for what a worker finds wrong with the set-up.
    """
    done = folder.receipts()
    if not execution.retry_failed:
        done |= folder.aside(done)
    units = [number for number in range(len(samples)) if number not in done]
    seen, failures = sum(r.samples for r in done.values()), sum(r.failures for r in done.values())
    aside = sum(receipt.reason is not None for receipt in done.values())
    follow(Progress(seen, sum(samples), failures, aside))
    if not units:
        return
    folder.reopen(units)
    with ray_session(execution.address):
        asked = None if execution.workers is None else (execution.workers, execution.workers)
        pool = actor_pool(asked, execution.gpus_per_worker, machines(), len(units))
        # Nothing is fetched ahead: what is committed is told at once, not when the next unit is done too.
        for receipts in start(units, pool).iter_batches(batch_size=None, prefetch_batches=0):
            if problem := next(filter(None, receipts["problem"]), None):
                raise InputError(problem)
            seen += int(sum(receipts["samples"]))
            failures += int(sum(receipts["failures"]))
            aside += sum(map(bool, receipts["reason"]))
            follow(Progress(seen, sum(samples), failures, aside))
