"""The folder of a run: its layout, and how shards are committed, retried and quarantined.

    run.json                          settings, fingerprint, versions, model, data digest; written once
    manifest.json                     which samples are in which shard; written once
    lease/000003.json                 which process drives the run (`mmray.runs.lease`)
    refreshes/000001/                 data added later (`mmray.runs.refreshes`)
    attempts/000012/1                 first attempt at shard 12: on which worker, and why it failed
    shards/000012/5f3c-concepts.parquet   parts of shard 12, named by the attempt that wrote them
    receipts/000012.json              the receipt names the parts; the first attempt to create it has committed
    aside/000012.json                 shard 12 is quarantined, with the reason
    snapshots/census/                 tables, made from the committed parts alone (`mmray.runs.snapshots`)
    tables/rankings.parquet           a copy of each table, for other tools

A part is complete before its receipt names it, and a receipt is created only if absent. So a killed worker leaves
nothing but unnamed parts, and one that wakes up late can't replace what was committed. On a store without
create-if-absent, an object `commits-by-name` says so, and all commits go through `mmray.storage.NamedCommits`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import pyarrow as pa

from mmray.errors import DamagedError, InputError
from mmray.runs.pieces import bounds_of
from mmray.runs.receipts import Receipt, unit_of
from mmray.runs.refreshes import latest
from mmray.runs.tables import from_bytes, part_to_bytes
from mmray.storage import Checksum, NamedCommits, RetryingStore, Store, commits_once, is_full, is_outage, open_store

ATTEMPTS = 3
"""Attempts at a shard without a commit before it is quarantined."""
BY_NAME = "commits-by-name"
"""Key whose presence says that this run's store commits by name."""
REPLACED = "another run has since begun here, so this worker stops; give each run an OUT of its own"
logger = logging.getLogger(__name__)


class DamagedUnitError(DamagedError):
    """The receipt or a part of a unit is not what was written; the message says how to have the unit done again."""

    def __init__(self, folder: RunFolder, key: str, why: str, receipt: str) -> None:
        super().__init__(f"{folder.store.uri}: {key}: {why}; remove {receipt} and run the same command again")
        self.folder, self.key, self.why = folder, key, why
        self.what = f"{folder.store.uri}: {key}: {why}; {receipt} is removed"
        self.receipt = receipt

    def discard(self) -> None:
        """Remove the receipt, so that the unit is done again. The caller must hold the run's lease."""
        self.folder.store.delete(self.receipt)


class RunFolder:
    """One run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._began = ""

    @classmethod
    def at(cls, uri: str | Path) -> RunFolder:
        """Return the folder at a local path or `s3://bucket/prefix`, whether or not it holds a run.

        An outage during this call raises at once; later ones are retried.
        """
        store = RetryingStore(open_store(uri))
        return cls(NamedCommits(store) if store.exists(BY_NAME) else store)

    def begin(self, info: dict[str, Any], manifest: bytes) -> None:
        """Create the run, or join the existing one; raises InputError if that has other settings.

        A store that can't be written to raises here, before any work.
        """
        existing = self.info()
        if existing is None:
            self.prepare()
            # Of several drivers that begin at once, the first to commit run.json wins: read back what counts.
            self.store.commit("run.json", json.dumps(info, indent=1, sort_keys=True).encode())
            existing = self.info() or info
        _check_same_settings(existing, info, self.store.uri)
        # Written last, so that only drivers with the run's settings write it: their manifests are equal.
        self.store.commit("manifest.json", manifest)

    def prepare(self) -> None:
        """Detect how the store commits, and record it there; raises InputError if nothing can be written."""
        if not isinstance(self.store, NamedCommits) and not commits_once(self.store):
            self.store.put(BY_NAME, b"")
            self.store = NamedCommits(self.store)

    def make_way(self, fingerprint: str) -> None:
        """Remove a run of another fingerprint without results, such as one with a mistyped setting.

        A result is a committed or quarantined unit. The caller must hold the run's lease.
        """
        info = self.info()
        if (
            info is None
            or info["fingerprint"] == fingerprint
            or self.store.list("receipts/") + self.store.list("aside/")
        ):
            return
        for entry in self.store.list():
            if entry.key.split("/")[0] in ("manifest.json", "attempts", "shards"):
                self.store.delete(entry.key)
        self.store.delete("run.json")
        self._began = ""

    def info(self) -> dict[str, Any] | None:
        """Return run.json with the changes of refreshes, or None if no run has begun.

        Raises InputError if mmray did not write it.
        """
        data = self._read_if_there("run.json")
        if data is None:
            return None
        try:
            info: dict[str, Any] = json.loads(data)
            self._began = str(info["fingerprint"])
            objects = (info["result_settings"], info["digests"], info.get("settings", {}))
            if not all(isinstance(part, dict) for part in objects) or not isinstance(info.get("shards", 0), int):
                raise TypeError
            info |= latest(self.store).info
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.store.uri}/run.json: not written by mmray; give another folder") from error
        return info

    def manifest(self) -> bytes:
        """Return the bytes of the manifest, including what refreshes have added."""
        return self.store.read(latest(self.store).manifest)

    def receipts(self) -> dict[int, Receipt]:
        """Return the receipts of committed shards by number, in order; raises DamagedUnitError for a damaged one."""
        return self._receipts("receipts/")

    def committed(self) -> set[int]:
        """Return which shards have a receipt, without reading any."""
        return {unit for entry in self.store.list("receipts/") if (unit := unit_of(entry.key)) is not None}

    def quarantined(self, committed: Collection[int] = ()) -> dict[int, Receipt]:
        """Return the receipts of quarantined shards, without those that a late worker has `committed` after all."""
        return {number: receipt for number, receipt in self._receipts("aside/").items() if number not in committed}

    def reasons(self, committed: Collection[int] = ()) -> dict[int, str]:
        """Return why each shard was quarantined, without those that a late worker has `committed` after all."""
        return {number: receipt.reason or "" for number, receipt in self.quarantined(committed).items()}

    def readable_receipts(self) -> tuple[dict[int, Receipt], dict[int, Receipt], list[DamagedUnitError]]:
        """Return the receipts of committed units, those of quarantined units, and the errors of damaged ones."""
        committed, damaged = self._read_receipts("receipts/")
        quarantined, more = self._read_receipts("aside/")
        return committed, {key: one for key, one in quarantined.items() if key not in committed}, damaged + more

    def _receipts(self, prefix: str) -> dict[int, Receipt]:
        receipts, damaged = self._read_receipts(prefix)
        if damaged:
            raise damaged[0]
        return receipts

    def _read_receipts(self, prefix: str) -> tuple[dict[int, Receipt], list[DamagedUnitError]]:
        """Return the valid receipts under a prefix by unit, in order, and the errors of the others."""
        keys = {number: entry.key for entry in self.store.list(prefix) if (number := unit_of(entry.key)) is not None}
        # Read after the listing: a refresh may add units meanwhile, and writes run.json before their receipts.
        info = self.info() if keys else None
        units = (info or {}).get("shards")
        receipts: dict[int, Receipt] = {}
        damaged: list[DamagedUnitError] = []
        # Receipts are small: on S3 their time is spent waiting for answers.
        with ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(self._read_if_there, keys.values()))
        for (number, key), data in sorted(zip(keys.items(), contents, strict=True)):
            try:
                if data is not None:
                    receipts[number] = self._checked(number, data, units)
            except DamagedError as error:
                damaged.append(DamagedUnitError(self, key, str(error), key))
        return receipts, damaged

    def _read_if_there(self, key: str) -> bytes | None:
        try:
            return self.store.read(key)
        except FileNotFoundError:
            return None

    def _checked(self, number: int, data: bytes, units: int | None = None) -> Receipt:
        receipt = Receipt.from_json(data)
        receipt.check(number, self._fingerprint(), units)
        return receipt

    def _fingerprint(self) -> str:
        # That of the run's beginning, which refreshes keep; empty if no run has begun.
        if not self._began:
            self.info()
        return self._began

    def receipt(self, shard_id: int) -> Receipt | None:
        """Return a shard's receipt, or None if it isn't committed; raises DamagedUnitError for a damaged one."""
        key = f"receipts/{shard_id:06d}.json"
        data = self._read_if_there(key)
        try:
            return None if data is None else self._checked(shard_id, data)
        except DamagedError as error:
            raise DamagedUnitError(self, key, str(error), key) from error

    def repair(self) -> dict[int, Receipt]:
        """Discard damaged receipts, and receipts with missing or truncated parts, so that their units are done again.

        Returns the remaining receipts by shard. The caller must hold the run's lease.
        """
        receipts, damaged = self._read_receipts("receipts/")
        damaged += self._read_receipts("aside/")[1]
        # Sizes come from one listing. The bytes of parts are checked when they are read.
        sizes = {entry.key: entry.size for entry in self.store.list("shards/")} if receipts else {}
        for number, receipt in receipts.items():
            for name, key in (receipt.parts or {}).items():
                try:
                    if key not in sizes:
                        raise DamagedError("gone")
                    if receipt.checksums is not None:
                        receipt.checksums[name].check_size(sizes[key])
                except DamagedError as error:
                    damaged.append(DamagedUnitError(self, key, str(error), f"receipts/{number:06d}.json"))
                    break
        for damage in damaged:
            logger.warning("%s; its unit will be done again", damage.what)
            damage.discard()
        discarded = {damage.receipt for damage in damaged}
        return {number: one for number, one in receipts.items() if f"receipts/{number:06d}.json" not in discarded}

    def attempt(self, shard_id: int, node: str = "") -> int:
        """Record an attempt and return its number, from 1.

        Attempts are counted in storage because Ray restarts a dead worker forever, without telling it why.
        """
        number = 1
        worker = f"{socket.gethostname()}:{os.getpid()}"
        data = json.dumps({"worker": worker, "node": node, "token": uuid4().hex}).encode()
        while not self.store.commit(key := f"attempts/{shard_id:06d}/{number}", data):
            # A commit retried after a lost response finds its own object.
            if self._read_if_there(key) == data:
                break
            number += 1
        return number

    def deaths(self, shard_id: int, before: int, alive: Callable[[str], bool]) -> int:
        """Return how many attempts before number `before` failed because of the unit itself."""
        count = 0
        for number in range(1, before):
            record = _record(self._read_if_there(f"attempts/{shard_id:06d}/{number}") or b"")
            node = record.get("node")
            # An attempt without a reason on a node that is gone was lost with the node: preempted or drained.
            count += bool(record.get("reason") or not node or alive(str(node)))
        return count

    def record_death(self, shard_id: int, number: int, reason: str) -> None:
        """Record why an attempt failed."""
        self.store.put(f"attempts/{shard_id:06d}/{number}", json.dumps({"reason": reason}).encode())

    def quarantine(self, shard_id: int, samples: int, reason: str = "", last_attempt: int = ATTEMPTS) -> Receipt:
        """Quarantine a shard, with the given reason or else that of its last attempt."""
        if not reason:
            record = _record(self._read_if_there(f"attempts/{shard_id:06d}/{last_attempt}") or b"")
            reason = f"given up after {ATTEMPTS} attempts: {record.get('reason') or 'the worker died without a word'}"
        receipt = Receipt(shard_id, samples=samples, reason=reason, run=self._fingerprint())
        self.store.commit(f"aside/{shard_id:06d}.json", receipt.to_json())
        return receipt

    def reopen(self, shards: Collection[int]) -> None:
        """Forget attempts and quarantine of these shards, so that a resumed run starts them afresh."""
        # An attempt that was interrupted together with its driver says nothing about the shard.
        pending = set(shards)
        for entry in self.store.list("attempts/") + self.store.list("aside/"):
            if unit_of(entry.key) in pending:
                self.store.delete(entry.key)

    def commit_shard(
        self,
        shard_id: int,
        tables: dict[str, pa.Table],
        samples: int,
        seconds: float,
        skipped: Mapping[str, int] = MappingProxyType({}),
        phases: Mapping[str, float] = MappingProxyType({}),
        memory: Mapping[str, int] = MappingProxyType({}),
        notes: Sequence[str] = (),
    ) -> Receipt:
        """Write the shard's parts, then its receipt; return the receipt that counts, perhaps that of another attempt.

        `phases` are seconds per phase of the work, `memory` the worker's peak in bytes, `notes` lines for the status.
        """
        token, began = uuid4().hex[:8], time.perf_counter()
        parts = {name: f"shards/{shard_id:06d}/{token}-{name}.parquet" for name in tables}
        checksums = self._write_parts(parts, tables)
        receipt = Receipt(
            shard_id,
            samples=samples,
            occurrences=len(tables.get("occurrences", ())),
            # A sample may have several rows.
            failures=len(set(tables["errors"]["source"].to_pylist())),
            skipped={reason: count for reason, count in sorted(skipped.items()) if count},
            seconds=round(seconds, 3),
            parts=parts,
            run=self._fingerprint(),
            checksums=checksums,
            bounds={name: bounds for name, table in tables.items() if (bounds := bounds_of(table))},
            phases={name: round(spent, 3) for name, spent in {**phases, "commit": time.perf_counter() - began}.items()},
            memory=dict(memory),
            notes=list(notes),
        )
        self._check_not_replaced()
        if self.store.commit(f"receipts/{shard_id:06d}.json", receipt.to_json()):
            return receipt
        committed = self.receipt(shard_id)
        if committed is None:
            raise InputError(f"{self.store.uri}: receipts/{shard_id:06d}.json was removed meanwhile; run again")
        # A commit retried after a lost response finds our own receipt: then the parts must stay.
        if committed != receipt:
            for key in parts.values():
                self.store.delete(key)
        return committed

    def _write_parts(self, parts: Mapping[str, str], tables: Mapping[str, pa.Table]) -> dict[str, Checksum]:
        """Write each table under its key in `parts`; return their checksums."""

        def write(name: str) -> Checksum:
            self.store.commit(parts[name], files[name])
            return Checksum.of(files[name], len(tables[name]))

        with ThreadPoolExecutor(len(parts)) as pool:
            files = dict(zip(tables, pool.map(part_to_bytes, tables.values()), strict=True))
            try:
                return dict(zip(tables, pool.map(write, tables), strict=True))
            except OSError as error:
                # Otherwise each retry would fill the disk further. In an outage nothing can be removed anyway.
                if not is_outage(error):
                    for key in parts.values():
                        self.store.delete(key)
                if is_full(error):
                    needed = sum(map(len, files.values())) / 1e6
                    reason = f"{error.strerror}, where {needed:,.1f} MB are needed"
                    raise OSError(error.errno, reason, self.store.uri) from error
                raise

    def _check_not_replaced(self) -> None:
        """Raise InputError if another run has replaced this one (`make_way`): this worker's driver is dead."""
        data = self._read_if_there("run.json")
        if data is not None and self._began not in ("", str(json.loads(data).get("fingerprint"))):
            raise InputError(f"{self.store.uri}: {REPLACED}")

    def read_part(self, receipt: Receipt, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return one part of a committed shard, or these columns, in the part's order, as far as it has them.

        Raises DamagedUnitError if it is not what was committed.
        """
        with self._naming_damage(receipt, name) as key:
            return from_bytes(self._checked_part(receipt, name, key), columns)

    def read_file(self, receipt: Receipt, name: str) -> bytes:
        """Return the file of a part; raises DamagedUnitError if it is not what was committed."""
        with self._naming_damage(receipt, name) as key:
            return self._checked_part(receipt, name, key)

    @contextmanager
    def _naming_damage(self, receipt: Receipt, name: str) -> Iterator[str]:
        """Yield the key of a part; damage found within the block is raised with it."""
        key = (receipt.parts or {}).get(name, name)
        try:
            yield key
        except DamagedError as error:
            raise DamagedUnitError(self, key, str(error), f"receipts/{receipt.shard_id:06d}.json") from error

    def _checked_part(self, receipt: Receipt, name: str, key: str) -> bytes:
        data = self._read_if_there(key)
        if data is None:
            raise DamagedError("gone")
        if receipt.checksums is not None:
            receipt.checksums[name].check(data)
        return data


def _record(attempt: bytes) -> dict[str, Any]:
    """Return the record of an attempt; empty if it can't be read."""
    try:
        record = json.loads(attempt)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _check_same_settings(existing: dict[str, Any], requested: dict[str, Any], uri: str) -> None:
    """Raise InputError, naming what differs, unless the existing run has the requested settings and inputs."""
    if existing["fingerprint"] == requested["fingerprint"]:
        return
    old, new = existing["result_settings"], requested["result_settings"]
    changes = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    others = [name for name, digest in existing["digests"].items() if digest != requested["digests"].get(name)]
    if not changes and others == ["data"]:
        raise InputError(
            f"{uri}: holds a run of other data; choose another OUT, or add what is new: mmray refresh {uri}"
        )
    changes += [f"other {name}" for name in others]
    raise InputError(f"{uri}: holds a run with other settings ({'; '.join(changes)}); choose another OUT")
