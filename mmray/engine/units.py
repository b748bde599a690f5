"""What runs inside a worker: units done one by one, each committed once, attempts counted in storage."""

from __future__ import annotations

import errno
import logging
import socket
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from mmray.engine.clock import peak_memory, timed_phases
from mmray.engine.job import Job, Unit, UnitRefusedError, Worker
from mmray.engine.limits import TimeLimitError, interrupt_main_thread, time_limit
from mmray.errors import InputError, OutageError, StorageError
from mmray.runs import ATTEMPTS, Receipt, RunFolder
from mmray.runs.tables import ERRORS
from mmray.storage import with_retries

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a disk says that takes no more: not a unit's fault, and worth an end of the run."""

MOST_ATTEMPTS = 20
"""Attempts at a unit, whatever they died of: one that takes its whole machine down is quarantined, too."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkOrder:
    """What a worker is given: jobs that it does together, their contexts and units, and where each is committed.

    Units of all jobs are numbered through: those of a job follow those of the one before it.
    """

    jobs: Sequence[Job[Any, Any]]
    contexts: Sequence[Any]
    units: Sequence[Sequence[Unit]]
    folders: Sequence[str]
    fingerprints: Sequence[str]
    unit_timeout: float | None = None

    def place(self, number: int) -> tuple[int, int]:
        """Return which job a unit is of, and its number there."""
        starts = list(accumulate(map(len, self.units), initial=0))
        job = bisect_right(starts, number) - 1
        return job, number - starts[job]


class Node:
    """The machine that a worker runs on, as its executor knows it; here, this process."""

    name = ""

    def is_alive(self, name: str) -> bool:
        """Return whether a node is still there."""
        return True

    def stop(self) -> None:
        """End the work at hand, which has run too long."""
        interrupt_main_thread()


@dataclass(frozen=True)
class Answer:
    """What became of one unit."""

    size: int = 0
    failures: int = 0
    reason: str = ""
    """Why it was quarantined."""
    problem: str = ""
    """What is wrong with the set-up: it ends the job."""


class UnitRunner:
    """Does the units of a work order.

    Bad input that only a worker can find, such as weights that don't load, is an answer too: an exception would reach
    the driver as text, within Ray's report.
    """

    def __init__(self, order: WorkOrder, node: Node | None = None) -> None:
        self.order = order
        self.node = node or Node()
        self.problem = ""
        self.folders: list[RunFolder] = []
        self.workers: list[Worker] = []
        began = time.perf_counter()
        try:
            # The driver has reached all of this: an outage here passes.
            self.folders = [
                with_retries(partial(_begun, *where)) for where in zip(order.folders, order.fingerprints, strict=True)
            ]
            self.workers = with_retries(lambda: type(order.jobs[0]).workers(order.jobs, order.contexts))
        except InputError as error:
            self.problem = str(error)
        self.idle_since = time.perf_counter()
        self.before = {"load": self.idle_since - began}
        """Seconds of phases before the next unit, which its receipt notes."""

    def run(self, number: int) -> Answer:
        """Do one unit of work; nothing is done once there was a problem."""
        if self.problem:
            return Answer(problem=self.problem)
        job, own = self.order.place(number)
        self.before["wait"] = time.perf_counter() - self.idle_since
        try:
            receipt = self._attempted(self.folders[job], own, self.order.units[job][own], self.workers[job])
        except InputError as error:
            self.problem = str(error)
        except OSError as error:
            if error.errno not in DISK:
                raise
            uri = self.folders[job].store.uri
            self.problem = f"{uri}: {error.strerror}; make room and run the same command again to resume"
        self.before, self.idle_since = {}, time.perf_counter()
        if self.problem:
            return Answer(problem=self.problem)
        return Answer(receipt.samples, receipt.failures, receipt.reason or "")

    def _attempted(self, folder: RunFolder, number: int, unit: Unit, worker: Worker) -> Receipt:
        """Do a unit unless it is committed; the third death of a worker or the third error quarantines it.

        An outage of storage is waited out and then ends the run, as a full disk does: nothing is quarantined for it.
        A worker that died with its node says nothing about the unit.
        """
        committed = folder.receipt(number)
        if committed is not None:
            return committed
        limit = self.order.unit_timeout
        late = f"not done after {limit} s (--unit-timeout)"
        while True:
            attempt = folder.attempt(number, self.node.name)
            if folder.deaths(number, attempt, self.node.is_alive) >= ATTEMPTS or attempt > MOST_ATTEMPTS:
                return folder.quarantine(number, unit.size, last_attempt=attempt - 1)
            try:
                with time_limit(limit, self.node.stop, partial(folder.record_death, number, attempt, late)):
                    return with_retries(lambda: _committed(folder, number, unit, worker, self.before))
            except UnitRefusedError as error:
                return folder.quarantine(number, unit.size, str(error))
            except Exception as error:
                if _is_no_fault_of_the_unit(error):
                    raise
                logger.exception("unit %d, attempt %d", number, attempt)
                reason = late if isinstance(error, TimeLimitError) else f"{type(error).__name__}: {error}"
                folder.record_death(number, attempt, reason)


def _begun(uri: str, fingerprint: str) -> RunFolder:
    """Return the folder of units that the driver has begun.

    Raises InputError where this machine doesn't see it, or the driver is a dead one.
    """
    folder = RunFolder.at(uri)
    info = folder.info()
    if info is None:
        raise InputError(
            f"{folder.store.uri}: no run there for the worker on {socket.gethostname()}; give a folder that every "
            "machine of the cluster sees, such as s3://BUCKET/PREFIX"
        )
    if info["fingerprint"] != fingerprint:
        raise InputError(f"{folder.store.uri}: another run has been begun here; leave it to that one")
    return folder


def _committed(folder: RunFolder, number: int, unit: Unit, worker: Worker, before: Mapping[str, float]) -> Receipt:
    began = time.perf_counter()
    with timed_phases() as phases:
        result = worker(unit)
    tables = {"errors": ERRORS.empty_table(), **result.tables}
    seconds = time.perf_counter() - began
    return folder.commit_shard(number, tables, unit.size, seconds, result.skipped, {**before, **phases}, peak_memory())


def _is_no_fault_of_the_unit(error: Exception) -> bool:
    if isinstance(error, InputError):
        return isinstance(error, OutageError) or not isinstance(error, StorageError)
    return isinstance(error, OSError) and error.errno in DISK
