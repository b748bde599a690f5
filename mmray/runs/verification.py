"""Verify a run: read everything that it and its analyses have committed, and find damaged or missing files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mmray.errors import DamagedError, InputError, StorageError
from mmray.runs.analyses import RunJob, jobs_of
from mmray.runs.folder import DamagedUnitError, RunFolder
from mmray.runs.receipts import Receipt, unit_of
from mmray.runs.snapshots import Snapshot, open_snapshot, snapshots
from mmray.runs.tables import from_bytes
from mmray.storage import Checksum, Store

READERS = 8
"""Files that are read in parallel."""
UNIT_FOLDERS = ("attempts/", "receipts/", "aside/", "shards/")
SNAPSHOT_FILE = re.compile(r"snapshots/[^/]+/\d{6,}-\d{4,}(\.json|/[^/]+/\d{5,}\.parquet)")
EDIT, EDIT_ROWS = "edit.json", "edit.safetensors"
"""Files of an edit: its description, with the checksum of its rows, and the rows."""


@dataclass(frozen=True)
class Problem:
    """A damaged or missing file, and how to make it again."""

    path: str
    why: str
    command: str
    """Makes it again; empty if nothing can, or needs to."""
    settings: Mapping[str, Any]
    """The settings that the command was called with."""
    remove: str = ""
    """File to remove before that."""


@dataclass(frozen=True)
class VerificationResult:
    """What was read, and the problems found."""

    files: int
    bytes: int
    problems: tuple[Problem, ...]
    foreign: tuple[str, ...]
    """Files in folders of units and snapshots that mmray did not write; harmless."""


def verify_run(folder: RunFolder) -> VerificationResult:
    """Read every receipt, part, snapshot and table file of a run and its analyses, and check their checksums.

    Files that a driver replaces meanwhile are no problem.
    """
    jobs = [_Verification(job) for job in jobs_of(folder)]
    for job in jobs:
        job.verify()
    return VerificationResult(
        sum(job.files for job in jobs),
        sum(job.bytes for job in jobs),
        tuple(problem for job in jobs for problem in job.problems),
        tuple(path for job in jobs for path in job.foreign),
    )


@dataclass
class _Verification:
    """The verification of one job."""

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
            self._report(folder.store, "run.json", "not written by mmray, or truncated", remove="run.json")
            return {}

    def _units(self, folder: RunFolder, info: Mapping[str, Any], *, is_finished: bool) -> None:
        """Check receipts and parts of units; if tables were made from them, also that none is missing."""
        store = folder.store
        try:
            json.loads(folder.manifest())
        except (FileNotFoundError, ValueError):
            self._report(store, "manifest.json", "gone or truncated", remove="manifest.json")
        committed, quarantined, damaged = folder.readable_receipts()
        # Receipts and quarantined units; parts are counted as they are read below.
        self._count(entry.size for prefix in UNIT_FOLDERS[1:3] for entry in store.list(prefix))
        for damage in damaged:
            self._report(store, damage.key, damage.why, remove=damage.receipt)
        if is_finished:
            known = {*committed, *quarantined, *(unit_of(damage.key) for damage in damaged)}
            for number in range(info.get("shards", 0)):
                if number not in known:
                    self._report(store, f"receipts/{number:06d}.json", "gone")
        parts = [(receipt, name) for receipt in committed.values() for name in receipt.parts or {}]
        with ThreadPoolExecutor(READERS) as pool:
            for found, size in pool.map(lambda part: _read_part(folder, *part), parts):
                if found is None:
                    self._count([size])
                # Without its receipt, a driver has discarded the unit since it was listed.
                elif store.exists(found.receipt):
                    self._report(store, found.key, found.why, remove=found.receipt)
        for prefix in UNIT_FOLDERS:
            self.foreign += [f"{store.uri}/{entry.key}" for entry in store.list(prefix) if unit_of(entry.key) is None]

    def _edit(self, store: Store) -> None:
        """Check an edit's rows."""
        try:
            checksum = Checksum(**json.loads(store.read(EDIT))["rows"])
        except FileNotFoundError:
            # Not made yet: the receipt of its unit is missing, too, and is reported.
            return
        except (ValueError, KeyError, TypeError):
            self._report(store, EDIT, "no edit, or a truncated one", remove=EDIT)
            return
        self._file(store, EDIT_ROWS, checksum, remove=EDIT)

    def _tables(self) -> str | None:
        """Check snapshots and copies of tables; return the fingerprint of the units that the newest were made from."""
        store, name = self.job.tables, self.job.feature.name
        found = [
            self._snapshot(store, number, is_newest=not age)
            for age, number in enumerate(snapshots(store, name).get(name, []))
        ]
        newest = found[0] if found else None
        if newest is not None:
            for key, checksum in _copies(store, newest):
                self._file(store, key, checksum, remove=key)
        self.foreign += [
            f"{store.uri}/{entry.key}"
            for entry in store.list(f"snapshots/{name}/")
            if not SNAPSHOT_FILE.fullmatch(entry.key)
        ]
        return newest.made_from.get("fingerprint") if newest else None

    def _snapshot(self, store: Store, number: str, *, is_newest: bool) -> Snapshot | None:
        """Check a version of the tables."""
        key = f"snapshots/{self.job.feature.name}/{number}.json"
        try:
            snapshot = open_snapshot(store, self.job.feature.name, number)
        except FileNotFoundError:
            return None
        except DamagedError:
            self._report(store, key, "not a snapshot, or a truncated one", remove=key)
            return None
        self._count([0])
        for file in (file for files in snapshot.tables.values() for file in files):
            if is_newest:
                self._file(store, file.key, file.checksum)
            else:
                # Earlier versions are only for comparison: nothing makes them again.
                self._file(store, file.key, file.checksum, remove=key, command="")
        return snapshot

    def _file(self, store: Store, key: str, checksum: Checksum, remove: str = "", command: str | None = None) -> None:
        problem = _damage(store, key, checksum)
        if problem is None:
            self._count([checksum.size])
        else:
            self._report(store, key, problem, remove, command)

    def _count(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            self.files += 1
            self.bytes += size

    def _report(self, store: Store, key: str, why: str, remove: str = "", command: str | None = None) -> None:
        path = f"{store.uri}/{key}"
        # Versions of the tables share unchanged files: report each file once.
        if path not in {problem.path for problem in self.problems}:
            removed = f"{store.uri}/{remove}" if remove else ""
            redo = self.job.command if command is None else command
            self.problems.append(Problem(path, why, redo, self.settings, removed))


def _copies(store: Store, snapshot: Snapshot) -> Iterator[tuple[str, Checksum]]:
    """Yield the keys of a snapshot's copies in `tables/`, with their checksums."""
    for name, files in snapshot.tables.items():
        path = f"tables/{name}.parquet"
        in_folder = len(files) > 1 or bool(store.list(f"{path}/"))
        # Like `publish_tables`, which decides between a file and a folder.
        for number, file in enumerate(files):
            yield (f"{path}/{number:05d}.parquet" if in_folder else path), file.checksum


def _read_part(folder: RunFolder, receipt: Receipt, name: str) -> tuple[DamagedUnitError | None, int]:
    """Return the damage of a part, or None, and its size."""
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
