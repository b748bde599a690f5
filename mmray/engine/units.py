"""The inside of a worker: run units one by one, count attempts in storage, commit or quarantine each."""

from __future__ import annotations

import ctypes
import errno
import logging
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from mmray.engine.clock import peak_memory, timed_phases
from mmray.engine.job import Job, Unit, UnitRefusedError, Worker
from mmray.errors import InputError, OutageError, StorageError
from mmray.runs import ATTEMPTS, Receipt, RunFolder
from mmray.runs.tables import ERRORS
from mmray.storage import with_retries

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers of a disk that can't be written to; these end the run, and are no unit's fault."""

MOST_ATTEMPTS = 20
"""Attempts at a unit whatever the cause, so that a unit that brings down its machine is quarantined, too."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkOrder:
    """The work of a team of jobs with shared workers, as sent to each worker.

    Units of all jobs share one numbering: those of a job follow those of the previous one.
    """

    jobs: Sequence[Job[Any, Any]]
    contexts: Sequence[Any]
    units: Sequence[Sequence[Unit]]
    folders: Sequence[str]
    fingerprints: Sequence[str]
    unit_timeout: float | None = None

    def locate(self, number: int) -> tuple[int, int]:
        """Return the index of a unit's job, and the unit's number within it."""
        starts = list(accumulate(map(len, self.units), initial=0))
        job = bisect_right(starts, number) - 1
        return job, number - starts[job]


class Node:
    """The machine that a worker runs on; this class is for a worker in the driver's process."""

    name = ""

    def is_alive(self, name: str) -> bool:
        """Return whether a node is still alive."""
        return True

    def stop(self) -> None:
        """Stop the current unit, which has run too long."""
        interrupt_main_thread()


@dataclass(frozen=True)
class UnitOutcome:
    """What became of one unit."""

    size: int = 0
    failures: int = 0
    reason: str = ""
    """Why it was quarantined."""
    problem: str = ""
    """What is wrong with the set-up; ends the job."""


class UnitRunner:
    """Runs the units of a work order.

    A set-up problem that only a worker can see, such as weights that don't load, is an outcome, too: an exception would
    reach the driver only as text inside Ray's report.
    """

    def __init__(self, order: WorkOrder, node: Node | None = None) -> None:
        self.order = order
        self.node = node or Node()
        self.problem = ""
        self.folders: list[RunFolder] = []
        self.workers: list[Worker] = []
        began = time.perf_counter()
        try:
            # The driver has reached these folders already, so an outage is temporary.
            self.folders = [
                with_retries(partial(_open_folder, *where))
                for where in zip(order.folders, order.fingerprints, strict=True)
            ]
            self.workers = with_retries(lambda: type(order.jobs[0]).workers(order.jobs, order.contexts))
        except InputError as error:
            self.problem = str(error)
        self.idle_since = time.perf_counter()
        self.overhead = {"load": self.idle_since - began}
        """Seconds before the next unit by phase, which its receipt records."""

    def run(self, number: int) -> UnitOutcome:
        """Run one unit; after a set-up problem, only report that."""
        if self.problem:
            return UnitOutcome(problem=self.problem)
        job, own = self.order.locate(number)
        self.overhead["wait"] = time.perf_counter() - self.idle_since
        try:
            receipt = self._run_with_attempts(self.folders[job], own, self.order.units[job][own], self.workers[job])
        except InputError as error:
            self.problem = str(error)
        except OSError as error:
            if error.errno not in DISK:
                raise
            uri = self.folders[job].store.uri
            self.problem = f"{uri}: {error.strerror}; make room and run the same command again to resume"
        self.overhead, self.idle_since = {}, time.perf_counter()
        if self.problem:
            return UnitOutcome(problem=self.problem)
        return UnitOutcome(receipt.samples, receipt.failures, receipt.reason or "")

    def _run_with_attempts(self, folder: RunFolder, number: int, unit: Unit, worker: Worker) -> Receipt:
        """Run a unit unless it is committed; quarantine it after three errors or deaths of workers.

        Outages and full disks are retried, and then end the run without quarantining anything.
        """
        committed = folder.receipt(number)
        if committed is not None:
            return committed
        limit = self.order.unit_timeout
        late = f"not done after {limit} s (--unit-timeout)"
        while True:
            # Recorded before the work: if the unit kills this process, its next worker finds the record.
            attempt = folder.attempt(number, self.node.name)
            if folder.deaths(number, attempt, self.node.is_alive) >= ATTEMPTS or attempt > MOST_ATTEMPTS:
                return folder.quarantine(number, unit.size, last_attempt=attempt - 1)
            try:
                with time_limit(limit, self.node.stop, partial(folder.record_death, number, attempt, late)):
                    return with_retries(lambda: _run_and_commit(folder, number, unit, worker, self.overhead))
            except UnitRefusedError as error:
                return folder.quarantine(number, unit.size, str(error))
            # Anything that a worker raises counts against the unit, unless it concerns the whole run.
            except Exception as error:
                if not _is_fault_of_unit(error):
                    raise
                logger.exception("unit %d, attempt %d", number, attempt)
                reason = late if isinstance(error, TimeLimitError) else f"{type(error).__name__}: {error}"
                folder.record_death(number, attempt, reason)


def _open_folder(uri: str, fingerprint: str) -> RunFolder:
    """Return the folder that the driver has begun.

    Raises InputError if this machine can't see it, or another run has replaced it.
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


def _run_and_commit(folder: RunFolder, number: int, unit: Unit, worker: Worker, before: Mapping[str, float]) -> Receipt:
    began = time.perf_counter()
    with timed_phases() as phases:
        result = worker(unit)
    tables = {"errors": ERRORS.empty_table(), **result.tables}
    seconds = time.perf_counter() - began
    spent = {**before, **phases}
    return folder.commit_shard(number, tables, unit.size, seconds, result.skipped, spent, peak_memory(), result.notes)


def _is_fault_of_unit(error: Exception) -> bool:
    # Bad input and outages concern every unit. Other storage errors may concern one, such as an unreadable image.
    if isinstance(error, InputError):
        return isinstance(error, StorageError) and not isinstance(error, OutageError)
    return not (isinstance(error, OSError) and error.errno in DISK)


class TimeLimitError(Exception):
    """Raised in the main thread once a unit has run too long."""


@contextmanager
def time_limit(seconds: float | None, stop: Callable[[], None], record: Callable[[], None]) -> Iterator[None]:
    """Call `record` and then `stop`, from another thread, if the block takes longer; never if `seconds` is None."""
    if seconds is None:
        yield
        return

    def expire() -> None:
        # First: `stop` may end the process.
        record()
        stop()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interrupt_main_thread() -> None:
    """Raise TimeLimitError in the main thread; hanging native code is not interrupted until it returns."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(TimeLimitError))
