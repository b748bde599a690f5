"""Units of work carried out by actors: those not committed yet are handed out, and progress is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray.data

from mmray.cluster.census import check_complete
from mmray.engine import Progress
from mmray.engine.session import Pool, actor_pool, machines, ray_session
from mmray.errors import InputError
from mmray.runs import RunFolder
from mmray.settings import worker_range


def carry_out(
    folder: RunFolder,
    samples: Sequence[int],
    actors: Callable[[list[int]], ray.data.Dataset],
    follow: Callable[[Progress], None],
    check: Callable[[], None],
    *,
    address: str | None,
    retry_failed: bool,
) -> None:
    """Have every unit of a folder that is neither committed nor set aside done; `samples` has the size of each unit.

    `actors` takes units and returns the receipts to come. `check` raises where this driver is not to go on. Raises
    InputError for what a worker finds wrong with the set-up, and where units are missing at the end.
    """
    folder.repair()
    done = folder.receipts()
    if not retry_failed:
        done |= folder.aside(done)
    units = [number for number in range(len(samples)) if number not in done]
    seen, failures = sum(r.samples for r in done.values()), sum(r.failures for r in done.values())
    aside = sum(receipt.reason is not None for receipt in done.values())
    follow(Progress(seen, sum(samples), failures, aside))
    if not units:
        return
    folder.reopen(units)
    with ray_session(address):
        # Nothing is fetched ahead: what is committed is told at once, not when the next unit is done too.
        for receipts in actors(units).iter_batches(batch_size=None, prefetch_batches=0):
            check()
            if problem := next(filter(None, receipts["problem"]), None):
                raise InputError(problem)
            seen += int(sum(receipts["samples"]))
            failures += int(sum(receipts["failures"]))
            aside += sum(map(bool, receipts["reason"]))
            follow(Progress(seen, sum(samples), failures, aside))
    done = folder.receipts()
    over = done.keys() | folder.aside(done).keys()
    missing = [number for number in range(len(samples)) if number not in over]
    check_complete(folder.store.uri, missing)


def pool_for(workers: str | None, gpus_each: float | None, units: int) -> Pool:
    """Return the pool of actors for so many units, of the number that was asked for, if one was."""
    return actor_pool(worker_range(workers), gpus_each, machines(), units)
