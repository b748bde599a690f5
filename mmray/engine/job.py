"""What a job declares: its plan, what a worker makes of a unit, and what the committed parts amount to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from mmray.engine.settings import JobSettings
from mmray.runs import Receipt, RunFolder
from mmray.runs.snapshots import SnapshotWriter

S = TypeVar("S", bound=JobSettings)
P = TypeVar("P")

UNITS_AHEAD = 3
"""Units whose parts are being read while those of another are merged."""
READERS = 8


class UnitRefusedError(Exception):
    """Raised by a worker for a unit that no further attempt would help: it is quarantined at once."""


@dataclass(frozen=True)
class Unit:
    """One committed piece of work.

    `size` is in the job's `unit_noun`, for progress. `payload` goes to the worker and stays small. Units of one
    `group` run on one actor, one after the other.
    """

    size: int
    payload: Any = None
    group: Hashable | None = None


@dataclass(frozen=True)
class UnitResult:
    """What a worker makes of a unit: its parts, and how many of its samples were skipped, by reason."""

    tables: Mapping[str, pa.Table]
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan(Generic[P]):
    """What a job consists of. Units are known by their place; `context` is all that workers need, too."""

    units: Sequence[Unit]
    digests: Mapping[str, str]
    """What results depend on in addition to settings: model, data, the run's tables, …"""
    context: P
    settled: JobSettings | None = None
    """The job's settings with what the plan has settled, where that is part of them; the fingerprint is theirs."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What run.json says in addition to what it says of every job."""
    manifest: bytes | None = None
    """What the job keeps of how its units were cut; by default their sizes."""


Worker = Callable[[Unit], UnitResult]
"""Turns a unit into its parts."""


@dataclass(frozen=True)
class Progress:
    """How far a job is, in its `unit_noun`; counts cover this and earlier calls."""

    done: int
    total: int
    failures: int
    quarantined: int


@dataclass(frozen=True)
class Parts:
    """The committed parts of a job, in the order of its units; read when asked for."""

    folder: RunFolder
    receipts: Mapping[int, Receipt]
    schemas: Mapping[str, pa.Schema]

    def each(self, name: str) -> Iterator[pa.Table]:
        """Yield one part of every unit."""
        for receipt in self.receipts.values():
            yield self.folder.read_part(receipt, name)

    def table(self, name: str) -> pa.Table:
        """Return one part of all units, put together."""
        return pa.concat_tables([self.schemas[name].empty_table(), *self.each(name)])

    def by_unit(self, names: Collection[str]) -> Iterator[dict[str, pa.Table]]:
        """Yield some parts of every unit by name, those of the next few units being read meanwhile."""
        with ThreadPoolExecutor(READERS) as pool:
            waiting: deque[dict[str, Future[pa.Table]]] = deque()
            for receipt in self.receipts.values():
                waiting.append({name: pool.submit(self.folder.read_part, receipt, name) for name in names})
                if len(waiting) > UNITS_AHEAD:
                    yield {name: part.result() for name, part in waiting.popleft().items()}
            while waiting:
                yield {name: part.result() for name, part in waiting.popleft().items()}


@dataclass
class Output:
    """Takes what a merge makes: tables, part by part, and files of the target. All become visible together."""

    snapshot: SnapshotWriter
    files: dict[str, bytes] = field(default_factory=dict)

    def table(self, name: str, rows: pa.Table) -> None:
        """Add rows to a table. A table that no row is added to stays as an earlier call wrote it."""
        self.snapshot.add(name, rows)

    def file(self, key: str, data: bytes) -> None:
        """Put a file into the target, in place of an earlier one."""
        self.files[key] = data


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a finished job amounts to."""

    job: str
    done: int
    """Committed, in the job's `unit_noun`."""
    failures: int
    """Samples, or whatever is counted, that failed."""
    quarantined: Mapping[int, str]
    """Unit → why it was given up."""
    seconds: float
    headline: Mapping[str, Any]
    parts: Parts
    already: bool
    """Whether earlier calls had done all of it."""

    @property
    def complete(self) -> bool:
        """Whether all went well."""
        return not self.failures and not self.quarantined

    def summary(self) -> dict[str, Any]:
        """Return what --json says of the job."""
        own = ("job", "done", "failures", "quarantined", "seconds")
        return {name: getattr(self, name) for name in own} | dict(self.headline)


class Job(ABC, Generic[S, P]):
    """An analysis with its settings; instances are pickled to workers."""

    name: ClassVar[str]
    """The feature's one name: its command, its folder in a run, its room."""
    unit_noun: ClassVar[str] = "samples"
    """What sizes of units count."""
    parts: ClassVar[Mapping[str, pa.Schema]]
    """What a unit commits; `errors`, a row per sample that failed, is added by the engine."""

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def target(self) -> str:
        """Folder whose tables and files the job writes: a run, an edit, or OUT."""

    @property
    def place(self) -> str:
        """Folder of the job's lease, below which its units are committed."""
        return f"{self.target}/{self.name}"

    @abstractmethod
    def plan(self) -> Plan[P]:
        """Settle the units; raises InputError for anything wrong with the set-up."""

    @abstractmethod
    def worker(self, context: P) -> Worker:
        """Load what is needed once, and return what turns a unit into its parts; raises InputError as `plan` does."""

    @abstractmethod
    def merge(self, plan: Plan[P], parts: Parts, output: Output) -> dict[str, Any]:
        """Write what the committed parts amount to, and return what the terminal and --json say of it (plain values).

        The same parts make the same tables, whatever the order or number of workers.
        """

    def folder(self, fingerprint: str) -> str:
        """Return where units are committed."""
        return f"{self.place}/{fingerprint}"

    @classmethod
    def workers(cls, jobs: Sequence[Job[S, P]], contexts: Sequence[P]) -> list[Worker]:
        """Return a worker per job, for jobs that one actor does together; override to load once what they share."""
        return [job.worker(context) for job, context in zip(jobs, contexts, strict=True)]
