"""Snapshots: versions of all of a job's tables, each made visible by one commit.

    snapshots/census/000007-0002.json            second merge of the seventh driver: its tables and their checksums
    snapshots/census/000007-0002/rankings/00000.parquet
    tables/rankings.parquet                      a copy of the newest version, for other tools

The first number is a fencing token, which a driver fixes when it takes its lease. A driver that has lost its lease
commits a lower number than its successor, so it can't replace new tables by old ones. Readers open the snapshot with
the highest number, and see all its tables, whatever is merged meanwhile.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import DamagedError, InputError
from mmray.runs.pieces import TableCutter, bounds_of
from mmray.runs.tables import from_bytes, to_bytes
from mmray.storage import Checksum, Store, filesystem

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

KEPT = 3
"""Snapshots of a job that are kept: the newest, one that readers may still use, and one to compare with."""
FILE_BYTES = 32 << 20
"""Bytes in memory at which a table starts a further file; bounds what a writer holds."""
COPIED_AT_ONCE = 4
"""Files that are copied in parallel, each held in memory."""

logger = logging.getLogger(__name__)

NAME = re.compile(r"snapshots/([^/]+)/(\d{6,}-\d{4,})\.json")
WRITTEN = re.compile(r"snapshots/[^/]+/(\d{6,})-\d{4,}/.*\.parquet")
"""A table's file; the group is the fencing token of the driver that wrote it."""


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    key: str
    checksum: Checksum
    bounds: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Lowest and highest value of each column by which the table is ordered."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that becomes one of a table, as it is."""

    read: Callable[[], bytes]
    """Raises DamagedError if it isn't what was written."""
    checksum: Checksum
    bounds: Mapping[str, Sequence[Any]]
    """As in `TableFile`."""


@dataclass(frozen=True)
class Snapshot:
    """One version of all tables of a job."""

    job: str
    number: str
    """Fencing token and number of the merge."""
    made_from: Mapping[str, str]
    """Digests of the inputs; a merge with the same ones would write the same tables."""
    headline: Mapping[str, Any]
    tables: Mapping[str, tuple[TableFile, ...]]

    @property
    def folder(self) -> str:
        """Prefix of its files."""
        return f"snapshots/{self.job}/{self.number}"

    def read(self, store: Store, name: str) -> pa.Table:
        """Return one of its tables; raises DamagedError, naming the file, if it isn't what was written."""
        return pa.concat_tables([_read(store, self.job, file) for file in self.tables[name]])

    def dataset(self, store: Store, name: str, schema: pa.Schema) -> Dataset:
        """Return one of its tables, for readers of a few rows: files and row groups without them are not read.

        Columns of the schema that the files lack are null. Pages that are read are checked, but not the whole file.
        """
        import pyarrow.dataset as ds

        system, root = filesystem(store.uri)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        parquet = ds.ParquetFileFormat(default_fragment_scan_options=options)
        fragments = [
            parquet.make_fragment(f"{root}/{file.key}", system, partition_expression=_within(file.bounds))
            for file in self.tables[name]
        ]
        whole = pa.unify_schemas([fragments[0].physical_schema, schema])
        return ds.FileSystemDataset(fragments, whole, parquet, system)

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
    """Return a committed snapshot; raises DamagedError if its file is damaged."""
    key = f"snapshots/{job}/{number}.json"
    try:
        content = json.loads(store.read(key))
        tables = {
            name: tuple(
                TableFile(file["key"], Checksum(**file["checksum"]), dict(file.get("bounds", {}))) for file in files
            )
            for name, files in content["tables"].items()
        }
        # The keys come from a file that anyone may have edited.
        if not all(file.key.startswith(f"snapshots/{job}/") for files in tables.values() for file in files):
            raise ValueError("files of another job")
        return Snapshot(job, number, dict(content["made_from"]), dict(content["headline"]), tables)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{store.uri}/{key}: not a snapshot, or a truncated one; run mmray {job} again") from error


def next_fence(store: Store, job: str, lease: int) -> int:
    """Return the fencing token of a driver that has just taken its lease: above those of all snapshots."""
    # Normally the lease's own number, unless someone has removed the leases of earlier drivers.
    numbers = snapshots(store, job).get(job, [])
    return max(lease, _order(numbers[0])[0] + 1 if numbers else 0)


def newest_readable(store: Store, job: str) -> Snapshot | None:
    """Return a job's newest undamaged snapshot; for writers, which replace a damaged one instead of raising."""
    for number in snapshots(store, job).get(job, []):
        try:
            return open_snapshot(store, job, number)
        except DamagedError as error:
            logger.warning("%s", error)
    return None


def newest(store: Store, job: str) -> Snapshot | None:
    """Return a job's newest snapshot, or None."""
    numbers = snapshots(store, job).get(job)
    return open_snapshot(store, job, numbers[0]) if numbers else None


@dataclass
class SnapshotWriter:
    """Writes the tables of a snapshot part by part; readers see nothing of them until `commit`."""

    store: Store
    job: str
    fence: int
    """From `next_fence`, called when the lease was taken."""
    number: str = ""
    tables: dict[str, _TableWriter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        orders = map(_order, snapshots(self.store, self.job).get(self.job, []))
        merges = [merge for fence, merge in orders if fence == self.fence]
        self.number = f"{self.fence:06d}-{max(merges, default=0) + 1:04d}"
        # A merge that died, perhaps of a full disk, has left files that no snapshot names.
        _prune(self.store, self.job, self.fence)

    def add(self, name: str, part: pa.Table) -> None:
        """Append rows to a table."""
        self._writer(name).add(part)

    def add_files(self, name: str, files: Sequence[WrittenFile]) -> None:
        """Append files to a table, as they are, whose other rows come in files, too."""
        self._writer(name).copy(files)

    def _writer(self, name: str) -> _TableWriter:
        return self.tables.setdefault(name, _TableWriter(self.store, f"snapshots/{self.job}/{self.number}/{name}"))

    def commit(self, made_from: Mapping[str, str], headline: Mapping[str, Any]) -> Snapshot:
        """Make all tables visible at once, and return the snapshot that readers now see.

        Tables of the previous snapshot that were not written again are kept. Raises InputError if a driver with a
        higher fencing token has committed meanwhile.
        """
        written = {name: tuple(writer.close()) for name, writer in self.tables.items()}
        previous = newest_readable(self.store, self.job)
        tables = dict(previous.tables if previous else {}) | written
        snapshot = Snapshot(self.job, self.number, dict(made_from), dict(headline), tables)
        plain = {name: [asdict(file) for file in files] for name, files in tables.items()}
        content = {"made_from": snapshot.made_from, "headline": snapshot.headline, "tables": plain}
        key, data = f"{snapshot.folder}.json", json.dumps(content, indent=1, sort_keys=True).encode()
        # A commit retried after a lost response finds its own object.
        if not self.store.commit(key, data) and self.store.read(key) != data:
            raise InputError(f"{self.store.uri}: snapshot {self.number} of {self.job} is taken; run the command again")
        # Checked after the commit: between an earlier check and the commit, a successor could have committed.
        if snapshots(self.store, self.job)[self.job][0] != self.number:
            raise InputError(f"{self.store.uri}: another driver has taken {self.job} over; leave it to that one")
        return snapshot


class _TableWriter:
    """Writes a table from parts, in order; memory does not grow with the table."""

    def __init__(self, store: Store, folder: str) -> None:
        self.store = store
        self.folder = folder
        self.files: list[TableFile] = []
        self._cutter: TableCutter | None = None

    def add(self, part: pa.Table) -> None:
        """Append a part, and write a file once there is enough for one."""
        self._cutter = self._cutter or TableCutter(part.schema, FILE_BYTES)
        for table in self._cutter.add(part):
            self._write(table)

    def close(self) -> list[TableFile]:
        """Write the rest, and return the table's files."""
        # An empty table is a file, too: it has a schema.
        if self._cutter and not (self._cutter.empty and self.files):
            self._write(self._cutter.rest())
        return self.files

    def copy(self, files: Sequence[WrittenFile]) -> None:
        """Append files."""
        keys = [self._key(number) for number in range(len(self.files), len(self.files) + len(files))]
        with ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
            list(pool.map(lambda key, file: self.store.put(key, file.read()), keys, files))
        self.files += [TableFile(key, file.checksum, file.bounds) for key, file in zip(keys, files, strict=True)]

    def _write(self, table: pa.Table) -> None:
        key, data = self._key(len(self.files)), to_bytes(table)
        self.store.put(key, data)
        self.files.append(TableFile(key, Checksum.of(data, len(table)), bounds_of(table)))

    def _key(self, number: int) -> str:
        return f"{self.folder}/{number:05d}.parquet"


def publish_tables(store: Store, snapshot: Snapshot) -> None:
    """Copy a snapshot's tables to `tables/NAME.parquet` for other tools, and remove old snapshots.

    A table of several files becomes a folder of that name.
    """

    def copy(file: TableFile, target: str) -> None:
        store.put(target, store.read(file.key))

    for name, files in snapshot.tables.items():
        path = f"tables/{name}.parquet"
        stale = {entry.key for entry in store.list(path)}
        # Once a folder, always a folder: a local file can't replace it in one step.
        folder = len(files) > 1 or f"{path}/00000.parquet" in stale
        targets = [f"{path}/{number:05d}.parquet" if folder else path for number in range(len(files))]
        if folder:
            store.delete(path)
        with ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
            list(pool.map(copy, files, targets))
        for key in stale - {*targets, path}:
            store.delete(key)
    _prune(store, snapshot.job, _order(snapshot.number)[0])


def is_published(store: Store, snapshot: Snapshot) -> bool:
    """Return whether the copies in `tables/` are those of a snapshot; a driver may have died before copying them."""
    for name, files in snapshot.tables.items():
        copies = store.list(f"tables/{name}.parquet")
        # Sizes first: they come from a listing, without reading anything.
        if [entry.size for entry in copies] != [file.checksum.size for file in files]:
            return False
        try:
            for entry, file in zip(copies, files, strict=True):
                file.checksum.check(store.read(entry.key))
        except (DamagedError, FileNotFoundError):
            return False
    return True


def _prune(store: Store, job: str, fence: int) -> None:
    """Remove all but the newest snapshots, and files that none of these names.

    Files of a higher fencing token than the driver's are left: its successor may be writing them.
    """
    kept: list[Snapshot] = []
    for number in snapshots(store, job).get(job, []):
        if len(kept) < KEPT:
            # A damaged snapshot is of no use to anyone, and is removed below.
            with suppress(DamagedError):
                kept.append(open_snapshot(store, job, number))
                continue
        store.delete(f"snapshots/{job}/{number}.json")
    named = {file.key for snapshot in kept for files in snapshot.tables.values() for file in files}
    for entry in store.list(f"snapshots/{job}/"):
        written = WRITTEN.match(entry.key)
        if written and int(written[1]) <= fence and entry.key not in named:
            store.delete(entry.key)


def _within(bounds: Mapping[str, Sequence[Any]]) -> pc.Expression:
    """Return what is true of all rows of a file."""
    within = pc.scalar(True)
    for column, (lowest, highest) in bounds.items():
        # An empty file has neither.
        if lowest is not None:
            within &= (pc.field(column) >= lowest) & (pc.field(column) <= highest)
    return within


def _read(store: Store, job: str, file: TableFile) -> pa.Table:
    try:
        data = store.read(file.key)
        file.checksum.check(data)
        return from_bytes(data)
    except (FileNotFoundError, DamagedError) as error:
        why = "is gone" if isinstance(error, FileNotFoundError) else str(error)
        raise DamagedError(f"{store.uri}/{file.key}: {why}; run mmray {job} again to rebuild the tables") from error


def _order(number: str) -> tuple[int, int]:
    fence, _, merge = number.partition("-")
    return int(fence), int(merge)
