"""The interface of a job: its plan of units, its worker, and the merge of committed parts into tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import pyarrow as pa

from mmray.engine.settings import JobSettings
from mmray.runs import Receipt, RunFolder
from mmray.runs.pieces import whole_name
from mmray.runs.snapshots import SnapshotWriter, WrittenFile

S = TypeVar("S", bound=JobSettings)
P = TypeVar("P")

UNITS_AHEAD, BYTES_AHEAD = 3, 64 << 20
"""Units whose parts are prefetched during a merge, and bytes of these parts; at least one unit."""
PARTIAL = "merging"
"""Folder of the partial merges in a job's root."""
READERS, FEW_READERS = 8, 4
"""Parts that are read in parallel; few of large ones, because what a thread has freed is kept for that thread."""


class UnitRefusedError(Exception):
    """Raised by a worker for a unit that another attempt would not help; the unit is quarantined at once."""


@dataclass(frozen=True)
class Unit:
    """A piece of work that is committed as a whole."""

    size: int
    """In the job's `unit_noun`; for progress."""
    payload: Any = None
    """Pickled to the worker: keep it small."""
    group: Hashable | None = None
    """Units of one group run on one actor, in order."""


@dataclass(frozen=True)
class UnitResult:
    """What a worker computed for a unit."""

    tables: Mapping[str, pa.Table]
    """The unit's parts."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Skipped samples by reason."""
    notes: Sequence[str] = ()
    """Why it took longer than it could have, one line each, for `mmray status`."""


@dataclass(frozen=True)
class Plan(Generic[P]):
    """The work of a job."""

    units: Sequence[Unit]
    """A unit's number is its index here."""
    digests: Mapping[str, str]
    """What results depend on in addition to settings: model, data, the run's tables, …"""
    context: P
    """Everything else that workers need; pickled to them."""
    settings: JobSettings | None = None
    """Replaces the job's settings in the fingerprint, if planning decides some of them."""
    run_info: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of run.json."""
    manifest: bytes | None = None
    """How the units were cut; by default their sizes."""


Worker = Callable[[Unit], UnitResult | Callable[[], UnitResult]]
"""Computes the parts of a unit; or does most of it, and returns what computes the rest (see `Job.overlaps`)."""


def finished(result: UnitResult | Callable[[], UnitResult]) -> UnitResult:
    """Return the result of a worker, after computing what is left of it."""
    return result() if callable(result) else result


Phase: TypeAlias = Literal["loading the model", "working", "merging"]
"""What a job does: its workers start and load the model until the first unit is done; tables are merged last."""


@dataclass(frozen=True)
class Progress:
    """Progress of a job in its `unit_noun`, including earlier calls."""

    done: int
    total: int
    failures: int
    quarantined: int
    phase: Phase = "working"
    step: str = ""
    """What is merged, and how many of its units are done, where workers merge."""


@dataclass(frozen=True)
class Parts:
    """The committed parts of a job, in the order of its units; read lazily."""

    folder: RunFolder
    receipts: Mapping[int, Receipt]
    schemas: Mapping[str, pa.Schema]

    def each(self, name: str) -> Iterator[pa.Table]:
        """Yield the part with this name of every unit."""
        for receipt in self.receipts.values():
            yield self.folder.read_part(receipt, name)

    def table(self, name: str) -> pa.Table:
        """Return the concatenation of `each(name)`."""
        # The empty table comes first, because a job may have no units.
        # Parts committed by an earlier version may lack a newer column, which is then filled with nulls.
        tables = [self.schemas[name].empty_table(), *self.each(name)]
        return pa.concat_tables(tables, promote_options="default")

    def size(self, name: str) -> int:
        """Return the bytes of a part, or its pieces, over all units; earlier versions did not record theirs."""
        checksums = (one.checksums or {} for one in self.receipts.values())
        return sum(file.size for known in checksums for part, file in known.items() if whole_name(part) == name)

    def sample(self, name: str, count: int) -> Iterator[pa.Table]:
        """Yield the part with this name of at most `count` units, evenly spread; of one in pieces each the next."""
        receipts = list(self.receipts.values())
        for number in range(count := min(count, len(receipts))):
            receipt = receipts[number * len(receipts) // count]
            pieces = [part for part in receipt.parts or {} if whole_name(part) == name]
            yield self.folder.read_part(receipt, pieces[number % len(pieces)])

    def by_unit(
        self,
        names: Collection[str] | Callable[[Receipt], Collection[str]],
        columns: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Iterator[dict[str, pa.Table]]:
        """Yield the named parts of every unit, of some only these `columns`; prefetches those of the next few units."""
        of = names if callable(names) else lambda _: names
        known = ((one.checksums or {}, of(one)) for one in self.receipts.values())
        sizes = (files[name].size for files, names in known for name in names if name in files)
        each = sum(sizes) // max(1, len(self.receipts))
        ahead = max(1, min(UNITS_AHEAD, BYTES_AHEAD // max(1, each)))
        with ThreadPoolExecutor(READERS if ahead > 1 else FEW_READERS) as pool:
            waiting: deque[dict[str, Future[pa.Table]]] = deque()
            for receipt in self.receipts.values():
                waiting.append(
                    {name: pool.submit(self.folder.read_part, receipt, name, columns.get(name)) for name in of(receipt)}
                )
                # Bounded, because parts of all units together may not fit into memory.
                if len(waiting) > ahead:
                    yield {name: part.result() for name, part in waiting.popleft().items()}
            while waiting:
                yield {name: part.result() for name, part in waiting.popleft().items()}


@dataclass
class Output:
    """Collects the tables and files that a merge writes; they become visible when it has finished."""

    snapshot: SnapshotWriter
    files: dict[str, bytes] = field(default_factory=dict)

    def table(self, name: str, rows: pa.Table) -> None:
        """Append rows to a table. Tables that are never appended to keep their earlier version."""
        self.snapshot.add(name, rows)

    def table_files(self, name: str, files: Iterable[tuple[Parts, Receipt, str]]) -> None:
        """Append to a table, as they are, files that are parts of units; see `Job.partial_merges`."""
        written = [
            WrittenFile(
                partial(parts.folder.read_file, receipt, part),
                (receipt.checksums or {})[part],
                receipt.bounds.get(part, {}),
            )
            for parts, receipt, part in files
        ]
        self.snapshot.add_files(name, written)

    def file(self, key: str, data: bytes) -> None:
        """Write a file into the target, replacing an earlier one."""
        self.files[key] = data


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """Outcome of a finished job."""

    job: str
    done: int
    """Committed, in the job's `unit_noun`."""
    failures: int
    """In the job's `unit_noun`, too."""
    quarantined: Mapping[int, str]
    """Unit → reason."""
    seconds: float
    headline: Mapping[str, Any]
    """Plain values for the terminal and --json."""
    parts: Parts
    already_done: bool
    """Whether earlier calls had done everything."""

    @property
    def complete(self) -> bool:
        """Whether nothing failed and nothing is quarantined."""
        return not self.failures and not self.quarantined

    def summary(self) -> dict[str, Any]:
        """Return the job's output for --json."""
        own = ("job", "done", "failures", "quarantined", "seconds")
        return {name: getattr(self, name) for name in own} | dict(self.headline)


class Job(ABC, Generic[S, P]):
    """An analysis with its settings; instances are pickled to workers."""

    name: ClassVar[str]
    """The feature's name: that of its command, its folder in a run, and its package."""
    unit_noun: ClassVar[str] = "samples"
    """What `Unit.size` counts."""
    parts: ClassVar[Mapping[str, pa.Schema]]
    """Schemas of what a unit commits; the engine adds `errors`, with a row per failed sample."""
    overlaps: ClassVar[bool] = False
    """Whether an actor may finish and commit a unit in one thread while it works on the next one in another."""

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def target(self) -> str:
        """Folder that the job writes tables and files to: a run, an edit, or OUT."""

    @property
    def root(self) -> str:
        """Folder of the job's lease; its units are committed inside."""
        return f"{self.target}/{self.name}"

    @abstractmethod
    def plan(self) -> Plan[P]:
        """Return the units and what they depend on; raises InputError for anything wrong with the set-up."""

    @abstractmethod
    def worker(self, context: P) -> Worker:
        """Load the model and whatever else units share; return the function that computes a unit's parts.

        Raises InputError for set-up problems that only a worker can see.
        """

    @abstractmethod
    def merge(self, plan: Plan[P], parts: Parts, output: Output) -> dict[str, Any]:
        """Merge the committed parts into tables, and return the headline for the terminal and --json.

        Must be deterministic: parts come in the order of units, whichever workers computed them.
        """

    def partial_merges(self, plan: Plan[P], parts: Parts) -> Sequence[Sequence[Job[Any, Any]]]:
        """Return steps to take before `merge`, which may read their parts; none by default.

        The jobs of a step share workers, and may read the parts of earlier steps. Their root must lie under `PARTIAL`
        in this job's own: it is removed once the tables are written.
        """
        return ()

    def folder(self, fingerprint: str) -> str:
        """Return the folder where units are committed."""
        return f"{self.root}/{fingerprint}"

    @classmethod
    def workers(cls, jobs: Sequence[Job[S, P]], contexts: Sequence[P]) -> list[Worker]:
        """Return a worker per job, for jobs that share actors; override to load a shared model only once."""
        return [job.worker(context) for job, context in zip(jobs, contexts, strict=True)]
