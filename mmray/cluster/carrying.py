"""Units of work carried out by actors: those not committed yet are handed out, and progress is told."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate

import ray.data

from mmray.cluster.census import check_complete
from mmray.engine import Progress
from mmray.engine.session import Pool, actor_pool, machines, ray_session
from mmray.errors import InputError
from mmray.runs import Receipt, RunFolder
from mmray.settings import worker_range


class Folders:
    """The units of several folders as those of one: the first of a folder has the number after the last of another."""

    def __init__(self, folders: Sequence[RunFolder], units: Sequence[int]) -> None:
        self.folders = folders
        self.starts = list(accumulate(units, initial=0))

    @property
    def uri(self) -> str:
        """Where all of them are."""
        return ", ".join(folder.store.uri for folder in self.folders)

    def place(self, number: int) -> tuple[int, int]:
        """Return which folder a unit is of, and its number there."""
        folder = bisect_right(self.starts, number) - 1
        return folder, number - self.starts[folder]

    def receipts(self) -> dict[int, Receipt]:
        """Return the receipts of all committed units."""
        return self._numbered([folder.receipts() for folder in self.folders])

    def aside(self, committed: Collection[int]) -> dict[int, Receipt]:
        """Return the units that were given up, but for those that are committed."""
        found = self._numbered([folder.aside() for folder in self.folders])
        return {number: receipt for number, receipt in found.items() if number not in committed}

    def reopen(self, units: Collection[int]) -> None:
        """Make ready to go on with these units, as if they had never been begun."""
        for place, folder in enumerate(self.folders):
            folder.reopen({unit for own, unit in map(self.place, units) if own == place})

    def _numbered(self, found: Sequence[Mapping[int, Receipt]]) -> dict[int, Receipt]:
        starts = zip(self.starts, found, strict=False)  # the last start is the end
        return {start + number: receipt for start, own in starts for number, receipt in own.items()}


def carry_out(
    folder: RunFolder | Folders,
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
    for part in folder.folders if isinstance(folder, Folders) else (folder,):
        part.repair()
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
    check_complete(folder.uri if isinstance(folder, Folders) else folder.store.uri, missing)


def pool_for(workers: str | None, gpus_each: float | None, units: int) -> Pool:
    """Return the pool of actors for so many units, of the number that was asked for, if one was."""
    return actor_pool(worker_range(workers), gpus_each, machines(), units)
