"""Read everything that a run and its analyses have committed, and say which files are not what was written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mmray.errors import DamagedError, InputError, StorageError
from mmray.runs.analyses import RunJob, jobs_of
from mmray.runs.folder import DamagedUnitError, RunFolder, unit_of
from mmray.runs.receipts import Receipt
from mmray.runs.snapshots import Snapshot, open_snapshot, snapshots
from mmray.runs.tables import from_bytes
from mmray.storage import Checksum, Store

READERS = 8
"""Files that are read at once."""
UNIT_FOLDERS = ("attempts/", "receipts/", "aside/", "shards/")
SNAPSHOT_FILE = re.compile(r"snapshots/[^/]+/\d{6,}-\d{4,}(\.json|/[^/]+/\d{5,}\.parquet)")
EDIT, EDIT_ROWS = "edit.json", "edit.safetensors"
"""Of an edit: what it is, with the checksum of its rows, and the rows."""


@dataclass(frozen=True)
class Problem:
    """A file that is not what was written, and how to have it written again."""

    path: str
    why: str
    command: str
    """Redoes it; empty where nothing can, or need."""
    settings: Mapping[str, Any]
    """Those that the command was called with."""
    remove: str = ""
    """What is to be removed before that."""


@dataclass(frozen=True)
class Verified:
    """What was read, and what is wrong with it."""

    files: int
    bytes: int
    problems: tuple[Problem, ...]
    foreign: tuple[str, ...]
    """Files in the folders of units and snapshots that mmray did not write; they change nothing."""


def verify_run(folder: RunFolder) -> Verified:
    """Read every receipt, part, snapshot and table file of a run and its analyses, and check each against its note.

    What a driver removes meanwhile, for it has something better, is no problem.
    """
    jobs = [_Verification(job) for job in jobs_of(folder)]
    for job in jobs:
        job.verify()
    return Verified(
        sum(job.files for job in jobs),
        sum(job.bytes for job in jobs),
        tuple(problem for job in jobs for problem in job.problems),
        tuple(path for job in jobs for path in job.foreign),
    )


@dataclass
class _Verification:
    job: RunJob
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def verify(self) -> None:
        infos = [self._info(folder) for folder in self.job.folders]
        self.settings = next((info["settings"] for info in infos if "settings" in info), {})
        made_from = self._tables()
        if self.job.feature.name == "editing":
            self._edit(self.job.tables)
        for folder, info in zip(self.job.folders, infos, strict=True):
            if info:
                self._units(folder, info, is_finished=info["fingerprint"] == made_from)

    def _info(self, folder: RunFolder) -> dict[str, Any]:
        try:
            return folder.info() or {}
        except StorageError:
            raise
        except InputError:
            self._wrong(folder.store, "run.json", "not written by mmray, or cut", remove="run.json")
            return {}

    def _units(self, folder: RunFolder, info: Mapping[str, Any], *, is_finished: bool) -> None:
        """Check what was committed of units, and that nothing is gone once tables were made of them."""
        store = folder.store
        try:
            json.loads(folder.manifest())
        except (FileNotFoundError, ValueError):
            self._wrong(store, "manifest.json", "gone or cut", remove="manifest.json")
        committed, aside, damaged = folder.readable_receipts()
        self._passed(entry.size for prefix in UNIT_FOLDERS[1:3] for entry in store.list(prefix))
        for damage in damaged:
            self._wrong(store, damage.key, damage.why, remove=damage.receipt)
        if is_finished:
            known = {*committed, *aside, *(unit_of(damage.key) for damage in damaged)}
            for number in range(info.get("shards", 0)):
                if number not in known:
                    self._wrong(store, f"receipts/{number:06d}.json", "gone")
        parts = [(receipt, name) for receipt in committed.values() for name in receipt.parts or {}]
        with ThreadPoolExecutor(READERS) as pool:
            for found, size in pool.map(lambda part: _read_part(folder, *part), parts):
                if found is None:
                    self._passed([size])
                elif store.exists(found.receipt):
                    self._wrong(store, found.key, found.why, remove=found.receipt)
        for prefix in UNIT_FOLDERS:
            self.foreign += [f"{store.uri}/{entry.key}" for entry in store.list(prefix) if unit_of(entry.key) is None]

    def _edit(self, store: Store) -> None:
        """Check an edit's rows; whether there is one at all, the receipt of its making says."""
        try:
            checksum = Checksum(**json.loads(store.read(EDIT))["rows"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            self._wrong(store, EDIT, "no edit, or a cut one", remove=EDIT)
            return
        self._file(store, EDIT_ROWS, checksum, remove=EDIT)

    def _tables(self) -> str | None:
        """Check snapshots and copies of tables; return the fingerprint of the units that the last were made from."""
        store, name = self.job.tables, self.job.feature.name
        last = None
        for place, number in enumerate(snapshots(store, name).get(name, [])):
            snapshot = self._snapshot(store, number, is_last=not place)
            last = snapshot if not place else last
        if last is not None:
            for key, checksum in _copies(store, last):
                self._file(store, key, checksum, remove=key)
        self.foreign += [
            f"{store.uri}/{entry.key}"
            for entry in store.list(f"snapshots/{name}/")
            if not SNAPSHOT_FILE.fullmatch(entry.key)
        ]
        return last.made_from.get("fingerprint") if last else None

    def _snapshot(self, store: Store, number: str, *, is_last: bool) -> Snapshot | None:
        """Check a version of the tables; earlier ones are there for comparison, and can only be removed."""
        key = f"snapshots/{self.job.feature.name}/{number}.json"
        try:
            snapshot = open_snapshot(store, self.job.feature.name, number)
        except FileNotFoundError:
            return None
        except DamagedError:
            self._wrong(store, key, "not a snapshot, or a cut one", remove=key)
            return None
        self._passed([0])
        for file in (file for files in snapshot.tables.values() for file in files):
            if is_last:
                self._file(store, file.key, file.checksum)
            else:
                self._file(store, file.key, file.checksum, remove=key, command="")
        return snapshot

    def _file(self, store: Store, key: str, checksum: Checksum, remove: str = "", command: str | None = None) -> None:
        problem = _damage(store, key, checksum)
        if problem is None:
            self._passed([checksum.size])
        else:
            self._wrong(store, key, problem, remove, command)

    def _passed(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            self.files += 1
            self.bytes += size

    def _wrong(self, store: Store, key: str, why: str, remove: str = "", command: str | None = None) -> None:
        path = f"{store.uri}/{key}"
        # Versions of the tables share the files that have stayed the same.
        if path not in {problem.path for problem in self.problems}:
            removed = f"{store.uri}/{remove}" if remove else ""
            redo = self.job.command if command is None else command
            self.problems.append(Problem(path, why, redo, self.settings, removed))


def _copies(store: Store, snapshot: Snapshot) -> Iterator[tuple[str, Checksum]]:
    """Yield the places of the copies that other tools read, with what each is."""
    for name, files in snapshot.tables.items():
        place = f"tables/{name}.parquet"
        in_folder = len(files) > 1 or bool(store.list(f"{place}/"))
        for number, file in enumerate(files):
            yield (f"{place}/{number:05d}.parquet" if in_folder else place), file.checksum


def _read_part(folder: RunFolder, receipt: Receipt, name: str) -> tuple[DamagedUnitError | None, int]:
    """Return what is wrong with a part, and its size."""
    try:
        table = folder.read_part(receipt, name)
        checksum = (receipt.checksums or {}).get(name)
        if checksum and checksum.rows not in (None, len(table)):
            raise DamagedUnitError(
                folder,
                (receipt.parts or {})[name],
                f"{len(table):,} rows instead of {checksum.rows:,}",
                f"receipts/{receipt.shard_id:06d}.json",
            )
    except DamagedUnitError as damage:
        return damage, 0
    return None, checksum.size if checksum else 0


def _damage(store: Store, key: str, checksum: Checksum) -> str | None:
    """Return why a file is not what was written; None if it is."""
    try:
        data = store.read(key)
        checksum.check(data)
        rows = len(from_bytes(data)) if key.endswith(".parquet") else checksum.rows
    except FileNotFoundError:
        return "gone"
    except DamagedError as error:
        return str(error)
    return None if checksum.rows in (None, rows) else f"{rows:,} rows instead of {checksum.rows:,}"
