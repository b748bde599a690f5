"""The inside of a worker: run units one by one, count attempts in storage, commit or quarantine each."""

from __future__ import annotations

import ctypes
import errno
import logging
import socket
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from mmray.engine.clock import peak_memory, timed_phases
from mmray.engine.job import Job, Unit, UnitRefusedError, Worker, finished
from mmray.errors import InputError, OutageError, StorageError
from mmray.runs import ATTEMPTS, Receipt, RunFolder
from mmray.runs.folder import REPLACED
from mmray.runs.tables import ERRORS
from mmray.storage import with_retries

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers of a disk that can't be written to; these end the run, and are no unit's fault."""

MOST_ATTEMPTS = 20
"""Attempts at a unit whatever the cause, so that a unit that brings down its machine is quarantined, too."""

Result = TypeVar("Result")
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
    """Runs the units of a work order, also when called by two threads: one works, the other finishes and commits.

    A set-up problem that only a worker can see, such as weights that don't load, is an outcome, too: an exception would
    reach the driver only as text inside Ray's report.
    """

    def __init__(self, order: WorkOrder, node: Node | None = None) -> None:
        self.order = order
        self.node = node or Node()
        self.problem = ""
        self.working, self.finishing = threading.Lock(), threading.Lock()
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
        job, own = self.order.locate(number)
        try:
            self._check()
            receipt = self._run_with_attempts(job, own, self.order.units[job][own])
        except InputError as error:
            self.problem = str(error)
        except OSError as error:
            if error.errno not in DISK:
                raise
            uri = self.folders[job].store.uri
            self.problem = f"{uri}: {error.strerror}; make room and run the same command again to resume"
        if self.problem:
            return UnitOutcome(problem=self.problem)
        return UnitOutcome(receipt.samples, receipt.failures, receipt.reason or "")

    def _check(self) -> None:
        if self.problem:
            raise InputError(self.problem)

    @contextmanager
    def _turn(self) -> Iterator[dict[str, float]]:
        """Wait until no other unit is worked on; yields the seconds since, which a receipt records, by phase."""
        with self.working:
            self._check()
            overhead, self.overhead = self.overhead, {}
            yield {**overhead, "wait": time.perf_counter() - self.idle_since}
            self.idle_since = time.perf_counter()

    def _run_with_attempts(self, job: int, number: int, unit: Unit) -> Receipt:
        """Run a unit unless it is committed; quarantine it after three errors or deaths of workers.

        Outages and full disks are retried, and then end the run without quarantining anything.
        """
        folder, limit = self.folders[job], self.order.unit_timeout
        committed = folder.receipt(number)
        if committed is not None:
            return committed
        late = f"not done after {limit} s (--unit-timeout)"
        while True:
            with ExitStack() as turn:
                overhead = turn.enter_context(self._turn())
                # Recorded before the work: if the unit kills this process, its next worker finds the record.
                attempt = folder.attempt(number, self.node.name)
                if folder.deaths(number, attempt, self.node.is_alive) >= ATTEMPTS or attempt > MOST_ATTEMPTS:
                    # The reason is that of the attempt before: this one has only been noted.
                    return folder.quarantine(number, unit.size, last_attempt=attempt - 1)
                if attempt > 1:
                    # Alone, because two units in one process may die of either: the first attempt may have been
                    # another unit's fault, later ones can't be.
                    turn.enter_context(self.finishing)
                try:
                    with time_limit(limit, self.node.stop, partial(folder.record_death, number, attempt, late)):
                        return self._run_and_commit(job, number, unit, overhead, turn if attempt == 1 else None)
                except UnitRefusedError as error:
                    return folder.quarantine(number, unit.size, str(error))
                # Anything that a worker raises counts against the unit, unless it concerns the whole run.
                except Exception as error:
                    if not _is_fault_of_unit(error):
                        raise
                    logger.exception("unit %d, attempt %d", number, attempt)
                    reason = late if isinstance(error, TimeLimitError) else f"{type(error).__name__}: {error}"
                    folder.record_death(number, attempt, reason)

    def _run_and_commit(
        self, job: int, number: int, unit: Unit, overhead: Mapping[str, float], turn: ExitStack | None
    ) -> Receipt:
        """Work on a unit and commit it; with `turn`, end the turn as soon as only finishing is left."""
        folder, worker = self.folders[job], self.workers[job]
        rest, seconds, phases = with_retries(lambda: _timed(partial(worker, unit)))
        with ExitStack() as end:
            if turn is not None:
                # One unit at a time, because its parts may take as much memory as the next unit's work.
                end.enter_context(self.finishing)
                turn.close()
            result, more, later = _timed(partial(finished, rest))
            del rest
            tables = {"errors": ERRORS.empty_table(), **result.tables}
            spent = {**overhead, **(Counter(phases) + Counter(later))}
            return with_retries(
                lambda: folder.commit_shard(
                    number, tables, unit.size, seconds + more, result.skipped, spent, peak_memory(), result.notes
                )
            )


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
        raise InputError(f"{folder.store.uri}: {REPLACED}")
    return folder


def _timed(action: Callable[[], Result]) -> tuple[Result, float, dict[str, float]]:
    """Return what an action returns, its seconds, and those of its phases."""
    began = time.perf_counter()
    with timed_phases() as phases:
        result = action()
    return result, time.perf_counter() - began, phases


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
    # A local job works in the main thread, where Python raises the exception before its next bytecode.
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(TimeLimitError))
