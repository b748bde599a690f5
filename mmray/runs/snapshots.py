"""Versions of a job's tables: written aside, made visible by one commit, read as one.

    snapshots/census/000007-0002.json            the second merge of the seventh driver: its tables and their digests
    snapshots/census/000007-0002/rankings/00000.parquet
    tables/rankings.parquet                      a copy of the newest, for other tools

A snapshot is committed with a number that its driver settled when it took its lease. A driver that has lost its lease
commits a lower number than its successor, which nobody reads: it can't put old tables in place of new ones. A reader
opens the snapshot with the highest number and finds every table of it, whatever is merged meanwhile.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from mmray.errors import DamagedError, InputError
from mmray.runs.tables import from_bytes, to_bytes
from mmray.storage import Checksum, Store

KEPT = 3
"""Snapshots of a job that stay: the newest, that of readers at work, and the one before, to compare with."""
FILE_BYTES = 64 << 20
"""Size in memory at which a table is cut into a further file: what a writer holds at once, however large the table."""
SMALL_PARTS = 64
"""Parts that are joined as they come: one of a few rows takes more memory for its schema than for these."""

logger = logging.getLogger(__name__)

NAME = re.compile(r"snapshots/([^/]+)/(\d{6,}-\d{4,})\.json")


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    key: str
    checksum: Checksum


@dataclass(frozen=True)
class Snapshot:
    """One version of all tables of a job."""

    job: str
    number: str
    """Number of the driver, and of its merge."""
    made_from: Mapping[str, str]
    """What tells whether another merge would write anything else."""
    headline: Mapping[str, Any]
    tables: Mapping[str, tuple[TableFile, ...]]

    @property
    def folder(self) -> str:
        """Where its files lie."""
        return f"snapshots/{self.job}/{self.number}"

    def read(self, store: Store, name: str) -> pa.Table:
        """Return one of its tables; raises DamagedError, naming the file, where it isn't what was written."""
        return pa.concat_tables([_read(store, self.job, file) for file in self.tables[name]])

    def verify(self, store: Store) -> Iterator[str]:
        """Yield a line per file that is not what was written."""
        for file in (file for files in self.tables.values() for file in files):
            try:
                _read(store, self.job, file)
            except DamagedError as error:
                yield str(error)


def snapshots(store: Store, job: str | None = None) -> dict[str, list[str]]:
    """Return the numbers of all committed snapshots by job, newest first, from one listing."""
    found: dict[str, list[str]] = {}
    for entry in store.list(f"snapshots/{job}/" if job else "snapshots/"):
        if match := NAME.fullmatch(entry.key):
            found.setdefault(match[1], []).append(match[2])
    return {name: sorted(numbers, key=_order, reverse=True) for name, numbers in sorted(found.items())}


def open_snapshot(store: Store, job: str, number: str) -> Snapshot:
    """Return a committed snapshot; raises DamagedError where its file is cut."""
    key = f"snapshots/{job}/{number}.json"
    try:
        content = json.loads(store.read(key))
        tables = {
            name: tuple(TableFile(file["key"], Checksum(**file["checksum"])) for file in files)
            for name, files in content["tables"].items()
        }
        if not all(file.key.startswith(f"snapshots/{job}/") for files in tables.values() for file in files):
            raise ValueError("files of another job")
        return Snapshot(job, number, dict(content["made_from"]), dict(content["headline"]), tables)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{store.uri}/{key}: not a snapshot, or a cut one; run mmray {job} again") from error


def next_fence(store: Store, job: str, lease: int) -> int:
    """Return the number for the snapshots of a driver that has just taken its lease: above all that there are.

    That is the lease's number, unless somebody has removed the leases of earlier drivers.
    """
    numbers = snapshots(store, job).get(job, [])
    return max(lease, _order(numbers[0])[0] + 1 if numbers else 0)


def newest_whole(store: Store, job: str) -> Snapshot | None:
    """Return a job's newest snapshot whose file can be read, for who is about to write another."""
    for number in snapshots(store, job).get(job, []):
        try:
            return open_snapshot(store, job, number)
        except DamagedError as error:
            logger.warning("%s", error)
    return None


def newest(store: Store, job: str) -> Snapshot | None:
    """Return a job's newest snapshot; None where it has none."""
    numbers = snapshots(store, job).get(job)
    return open_snapshot(store, job, numbers[0]) if numbers else None


@dataclass
class SnapshotWriter:
    """Writes the tables of a snapshot, part by part; nothing is seen of them until `commit`."""

    store: Store
    job: str
    fence: int
    """What `next_fence` gave when the lease was taken."""
    number: str = ""
    tables: dict[str, _TableWriter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = [
            number for number in snapshots(self.store, self.job).get(self.job, []) if _order(number)[0] == self.fence
        ]
        self.number = f"{self.fence:06d}-{max((_order(number)[1] for number in own), default=0) + 1:04d}"
        # A merge that died, of a full disk maybe, has left files that nobody names.
        _forget(self.store, self.job)

    def add(self, name: str, part: pa.Table) -> None:
        """Take in rows of a table."""
        if name not in self.tables:
            self.tables[name] = _TableWriter(self.store, f"snapshots/{self.job}/{self.number}/{name}", part.schema)
        self.tables[name].add(part)

    def commit(self, made_from: Mapping[str, str], headline: Mapping[str, Any]) -> Snapshot:
        """Make the tables visible at once, and return what readers see from now on.

        Tables of the snapshot before that were not written again stay as they are. Raises InputError where a driver
        of a higher number has committed meanwhile.
        """
        written = {name: tuple(writer.close()) for name, writer in self.tables.items()}
        before = newest_whole(self.store, self.job)
        tables = dict(before.tables if before else {}) | written
        snapshot = Snapshot(self.job, self.number, dict(made_from), dict(headline), tables)
        content = {"made_from": snapshot.made_from, "headline": snapshot.headline, "tables": _plain(tables)}
        key, data = f"{snapshot.folder}.json", json.dumps(content, indent=1, sort_keys=True).encode()
        # A store whose answer was lost, and that was asked again, refuses what it has: it may be our own.
        if not self.store.commit(key, data) and self.store.read(key) != data:
            raise InputError(f"{self.store.uri}: snapshot {self.number} of {self.job} is taken; run the command again")
        if snapshots(self.store, self.job)[self.job][0] != self.number:
            raise InputError(f"{self.store.uri}: another driver has taken {self.job} over; leave it to that one")
        return snapshot


class _TableWriter:
    """Writes a table from parts in order: what is held at once does not grow with it."""

    def __init__(self, store: Store, folder: str, schema: pa.Schema) -> None:
        self.store = store
        self.folder = folder
        self.schema = schema
        self.files: list[TableFile] = []
        self._gathered: list[pa.Table] = []
        self._small: list[pa.Table] = []
        self._bytes = 0

    def add(self, part: pa.Table) -> None:
        """Take in a part, and write what has come together once it is a file's worth."""
        self._small.append(part)
        self._bytes += part.nbytes
        if len(self._small) == SMALL_PARTS:
            self._join_small()
        if self._bytes >= FILE_BYTES:
            self._flush()

    def close(self) -> list[TableFile]:
        """Write the rest, and return the table's files."""
        if self._bytes or self._small or not self.files:
            self._flush()
        return self.files

    def _join_small(self) -> None:
        # A part of an earlier version may lack a column that has come since.
        whole = pa.concat_tables([self.schema.empty_table(), *self._small], promote_options="default")
        self._gathered.append(whole.combine_chunks())
        self._small = []

    def _flush(self) -> None:
        self._join_small()
        table = pa.concat_tables(self._gathered)
        self._gathered, self._bytes = [], 0
        data = to_bytes(table)
        key = f"{self.folder}/{len(self.files):05d}.parquet"
        self.store.put(key, data)
        self.files.append(TableFile(key, Checksum.of(data, len(table))))


def publish(store: Store, snapshot: Snapshot) -> None:
    """Copy a snapshot's tables to `tables/NAME.parquet` for other tools, and remove snapshots that nobody needs.

    A table of one file is a file of that name, a larger one a folder.
    """
    for name, files in snapshot.tables.items():
        place = f"tables/{name}.parquet"
        stale = {entry.key for entry in store.list(place)}
        folder = len(files) > 1 or f"{place}/00000.parquet" in stale
        targets = [f"{place}/{number:05d}.parquet" if folder else place for number in range(len(files))]
        if folder:
            store.delete(place)
        for file, target in zip(files, targets, strict=True):
            store.put(target, store.read(file.key))
        for key in stale - {*targets, place}:
            store.delete(key)
    _forget(store, snapshot.job)


def is_published(store: Store, snapshot: Snapshot) -> bool:
    """Return whether other tools find its tables as they are: a driver may have died before it had copied them."""
    for name, files in snapshot.tables.items():
        copies = store.list(f"tables/{name}.parquet")
        if [entry.size for entry in copies] != [file.checksum.size for file in files]:
            return False
        try:
            for entry, file in zip(copies, files, strict=True):
                file.checksum.check(store.read(entry.key))
        except (DamagedError, FileNotFoundError):
            return False
    return True


def _forget(store: Store, job: str) -> None:
    """Remove snapshots but the newest, and files that none of those names."""
    kept: list[Snapshot] = []
    for number in snapshots(store, job).get(job, []):
        if len(kept) < KEPT:
            with suppress(DamagedError):
                kept.append(open_snapshot(store, job, number))
                continue
        store.delete(f"snapshots/{job}/{number}.json")
    named = {file.key for snapshot in kept for files in snapshot.tables.values() for file in files}
    for entry in store.list(f"snapshots/{job}/"):
        if entry.key not in named and entry.key.endswith(".parquet"):
            store.delete(entry.key)


def _read(store: Store, job: str, file: TableFile) -> pa.Table:
    try:
        data = store.read(file.key)
        file.checksum.check(data)
        return from_bytes(data)
    except FileNotFoundError as error:
        why = "is gone"
        raise DamagedError(f"{store.uri}/{file.key}: {why}; run mmray {job} again: it makes the tables anew") from error
    except DamagedError as error:
        raise DamagedError(
            f"{store.uri}/{file.key}: {error}; run mmray {job} again: it makes the tables anew"
        ) from error


def _plain(tables: Mapping[str, Iterable[TableFile]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(file) for file in files] for name, files in tables.items()}


def _order(number: str) -> tuple[int, int]:
    lease, _, merge = number.partition("-")
    return int(lease), int(merge)
