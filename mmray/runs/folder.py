"""The folder of a run: which object lies where, how a shard is committed, and what its receipts say.

    run.json                          settings, fingerprint, versions, model, data digest: written once
    manifest.json                     which samples are in which shard: written once
    lease/000003.json                 who drives the run (`mmray.runs.lease`)
    refreshes/000001/                 what the data had gained (`mmray.runs.refreshes`)
    attempts/000012/1                 a worker began shard 12 for the first time; where, and what it died of
    shards/000012/5f3c-concepts.parquet   parts of shard 12, named by the attempt that wrote them
    receipts/000012.json              the receipt: names the parts; whichever attempt creates it first has committed
    aside/000012.json                 shard 12 was given up, and why
    snapshots/census/                 its tables, made from the committed parts alone (`mmray.runs.snapshots`)
    tables/rankings.parquet           a copy of each, for other tools

A part is complete before its receipt names it, and a receipt is created only if absent: a killed worker leaves nothing
but unnamed parts, and one that wakes up late can't replace what was committed. On a store that can't create only if
absent an object `commits-by-name` says so, and all commits are `mmray.storage.NamedCommits`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import pyarrow as pa

from mmray.errors import DamagedError, InputError
from mmray.runs.receipts import Receipt
from mmray.runs.refreshes import latest
from mmray.runs.tables import from_bytes, to_bytes
from mmray.storage import Checksum, NamedCommits, RetryingStore, Store, commits_once, is_full, is_outage, open_store

ATTEMPTS = 3
"""Times that a shard may be begun and not committed before it is quarantined."""
BY_NAME = "commits-by-name"
"""Key whose presence says how this run's store commits."""
UNIT_KEY = re.compile(r"(?:receipts|aside)/(\d{6,})\.json|attempts/(\d{6,})/\d+|shards/(\d{6,})/[^/]+\.parquet")
"""Keys of objects that belong to a unit. All others were put there by somebody else, and are left alone."""

logger = logging.getLogger(__name__)


class DamagedUnitError(DamagedError):
    """The receipt or a part of a unit is not what was written; says which, and how to have the unit done again."""

    def __init__(self, folder: RunFolder, key: str, why: str, receipt: str) -> None:
        super().__init__(f"{folder.store.uri}: {key}: {why}; remove {receipt} and run the same command again")
        self.folder = folder
        self.key = key
        self.why = why
        self.what = f"{folder.store.uri}: {key}: {why}; {receipt} is removed"
        self.receipt = receipt

    def discard(self) -> None:
        """Remove the receipt, so that the unit is done again; only for who holds the run's lease."""
        self.folder.store.delete(self.receipt)


class RunFolder:
    """One run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._began = ""

    @classmethod
    def at(cls, uri: str | Path) -> RunFolder:
        """Return the folder at a local path or `s3://bucket/prefix`, whether a run is there or not.

        An outage now is raised at once; later ones are waited out.
        """
        store = RetryingStore(open_store(uri))
        return cls(NamedCommits(store) if store.exists(BY_NAME) else store)

    def begin(self, info: dict[str, Any], manifest: bytes) -> None:
        """Create the run, or join the one that is there; raises InputError if that has other settings.

        Of several that begin at once the first to commit run.json wins. The manifest comes after it, so that only
        those whose settings are the run's can write it, and theirs are equal. What is wrong with the store is told
        here, before any work.
        """
        before = self.info()
        if before is None:
            self.prepare()
            self.store.commit("run.json", json.dumps(info, indent=1, sort_keys=True).encode())
            before = self.info() or info
        check_same(before, info, self.store.uri)
        self.store.commit("manifest.json", manifest)

    def prepare(self) -> None:
        """Find out how the store commits, and note it there; raises InputError where nothing can be written."""
        if not isinstance(self.store, NamedCommits) and not commits_once(self.store):
            self.store.put(BY_NAME, b"")
            self.store = NamedCommits(self.store)

    def make_way(self, fingerprint: str) -> None:
        """Remove a run of another fingerprint that has no results: it was refused, or mistyped.

        Only who holds its lease may call this. A result is a committed unit, or one that was given up.
        """
        info = self.info()
        results = [*self.store.list("receipts/"), *self.store.list("aside/")]
        if info is None or info["fingerprint"] == fingerprint or results:
            return
        for entry in self.store.list():
            if entry.key.split("/")[0] in ("manifest.json", "attempts", "shards"):
                self.store.delete(entry.key)
        self.store.delete("run.json")
        self._began = ""

    def info(self) -> dict[str, Any] | None:
        """Return run.json, as refreshes have left it; None where no run has begun.

        Raises InputError if it is no run's.
        """
        data = self._read_if_there("run.json")
        if data is None:
            return None
        try:
            info: dict[str, Any] = json.loads(data)
            self._began = str(info["fingerprint"])
            if not isinstance(info["result_settings"], dict) or not isinstance(info["digests"], dict):
                raise TypeError
            if not isinstance(info.get("settings", {}), dict) or not isinstance(info.get("shards", 0), int):
                raise TypeError
            info |= latest(self.store).info
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.store.uri}/run.json: not written by mmray; give another folder") from error
        return info

    def manifest(self) -> bytes:
        """Return the bytes of the manifest, with all that refreshes have added."""
        return self.store.read(latest(self.store).manifest)

    def receipts(self) -> dict[int, Receipt]:
        """Return the receipts of all committed shards by shard, in order; raises DamagedUnitError for a wrong one."""
        return self._receipts("receipts/")

    def committed(self) -> set[int]:
        """Return which shards have a receipt, unread."""
        return {unit for entry in self.store.list("receipts/") if (unit := unit_of(entry.key)) is not None}

    def quarantined(self, committed: Collection[int] = ()) -> dict[int, Receipt]:
        """Return the shards that were given up, with their reasons; not those that a late worker has `committed`."""
        return {number: receipt for number, receipt in self._receipts("aside/").items() if number not in committed}

    def reasons(self, committed: Collection[int] = ()) -> dict[int, str]:
        """Return why shards were given up, by shard; not those that a late worker has `committed`."""
        return {number: receipt.reason or "" for number, receipt in self.quarantined(committed).items()}

    def readable_receipts(self) -> tuple[dict[int, Receipt], dict[int, Receipt], list[DamagedUnitError]]:
        """Return the receipts of committed units, those of quarantined ones, and what is wrong with any others."""
        committed, damaged = self._read_receipts("receipts/")
        aside, more = self._read_receipts("aside/")
        return committed, {number: one for number, one in aside.items() if number not in committed}, damaged + more

    def _receipts(self, prefix: str) -> dict[int, Receipt]:
        receipts, damaged = self._read_receipts(prefix)
        if damaged:
            raise damaged[0]
        return receipts

    def _read_receipts(self, prefix: str) -> tuple[dict[int, Receipt], list[DamagedUnitError]]:
        """Return the receipts below a prefix by unit, in order, and what is wrong with the others."""
        numbered = [(unit_of(entry.key), entry.key) for entry in self.store.list(prefix)]
        keys = dict(sorted((number, key) for number, key in numbered if number is not None))
        # Read after the listing: a refresh may add units, and their receipts come later.
        info = self.info() if keys else None
        units = (info or {}).get("shards")
        receipts: dict[int, Receipt] = {}
        damaged: list[DamagedUnitError] = []
        with ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(self._read_if_there, keys.values()))
        for (number, key), data in zip(keys.items(), contents, strict=True):
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
        """Return the fingerprint that the run began with, which no refresh changes; empty where no run has begun."""
        if not self._began:
            self.info()
        return self._began

    def receipt(self, shard_id: int) -> Receipt | None:
        """Return a shard's receipt if it is committed; raises DamagedUnitError for a wrong one."""
        key = f"receipts/{shard_id:06d}.json"
        data = self._read_if_there(key)
        try:
            return None if data is None else self._checked(shard_id, data)
        except DamagedError as error:
            raise DamagedUnitError(self, key, str(error), key) from error

    def repair(self) -> dict[int, Receipt]:
        """Discard receipts that are wrong, or whose parts are gone or cut, so that their units are done again.

        Return those that stay, by shard. Only who holds the run's lease may call this. What parts contain is checked
        where they are read.
        """
        receipts, damaged = self._read_receipts("receipts/")
        damaged += self._read_receipts("aside/")[1]
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
            logger.warning("%s, and the unit done again", damage.what)
            damage.discard()
        discarded = {damage.receipt for damage in damaged}
        return {number: one for number, one in receipts.items() if f"receipts/{number:06d}.json" not in discarded}

    def attempt(self, shard_id: int, node: str = "") -> int:
        """Count an attempt in storage, where it outlives the worker, and return its number from 1."""
        number = 1
        worker = {"worker": f"{socket.gethostname()}:{os.getpid()}", "node": node, "token": uuid4().hex}
        data = json.dumps(worker).encode()
        while not self.store.commit(key := f"attempts/{shard_id:06d}/{number}", data):
            # A store whose answer was lost, and that was asked again, refuses what it has: it may be our own.
            if self._read_if_there(key) == data:
                break
            number += 1
        return number

    def deaths(self, shard_id: int, before: int, alive: Callable[[str], bool]) -> int:
        """Return how many attempts before that number were the unit's own deaths.

        One that left no word, and whose node is gone, died of its node: preempted, drained, or lost.
        """
        count = 0
        for number in range(1, before):
            record = _record(self._read_if_there(f"attempts/{shard_id:06d}/{number}") or b"")
            node = record.get("node")
            count += bool(record.get("reason") or not node or alive(str(node)))
        return count

    def record_death(self, shard_id: int, number: int, reason: str) -> None:
        """Say what an attempt died of."""
        self.store.put(f"attempts/{shard_id:06d}/{number}", json.dumps({"reason": reason}).encode())

    def quarantine(self, shard_id: int, samples: int, reason: str = "", last_attempt: int = ATTEMPTS) -> Receipt:
        """Give a shard up, for a reason that no further attempt would fix, or else what its last attempt died of."""
        if not reason:
            record = _record(self._read_if_there(f"attempts/{shard_id:06d}/{last_attempt}") or b"")
            died_of = record.get("reason") or "the worker died without a word"
            reason = f"given up after {ATTEMPTS} attempts: {died_of}"
        receipt = Receipt(shard_id, samples=samples, reason=reason, run=self._fingerprint())
        self.store.commit(f"aside/{shard_id:06d}.json", receipt.to_json())
        return receipt

    def reopen(self, shards: Collection[int]) -> None:
        """Make a stopped run ready to go on with these shards, as if they had never been begun.

        An attempt that ended with its driver says nothing about the shard.
        """
        wanted = set(shards)
        for entry in self.store.list("attempts/") + self.store.list("aside/"):
            if unit_of(entry.key) in wanted:
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
    ) -> Receipt:
        """Write the shard's parts, then its receipt; return the receipt that counts, which may be an earlier one.

        `phases` are the seconds of each phase of the work, `memory` the most bytes that the worker has held.
        """
        token, began = uuid4().hex[:8], time.perf_counter()
        parts = {name: f"shards/{shard_id:06d}/{token}-{name}.parquet" for name in tables}

        def write(name: str) -> Checksum:
            self.store.commit(parts[name], files[name])
            return Checksum.of(files[name], len(tables[name]))

        with ThreadPoolExecutor(len(parts)) as pool:
            files = dict(zip(tables, pool.map(to_bytes, tables.values()), strict=True))
            try:
                checksums = dict(zip(tables, pool.map(write, tables), strict=True))
            except OSError as error:
                # A full disk must not be filled by one attempt after the other. (In an outage nothing can be removed.)
                if not is_outage(error):
                    for key in parts.values():
                        self.store.delete(key)
                if is_full(error):
                    needed = sum(map(len, files.values())) / 1e6
                    reason = f"{error.strerror}, where {needed:,.1f} MB are needed"
                    raise OSError(error.errno, reason, self.store.uri) from error
                raise
        receipt = Receipt(
            shard_id,
            samples=samples,
            occurrences=len(tables.get("occurrences", ())),
            # A sample may fail in more than one way.
            failures=len(set(tables["errors"]["source"].to_pylist())),
            skipped={reason: count for reason, count in sorted(skipped.items()) if count},
            seconds=round(seconds, 3),
            parts=parts,
            run=self._fingerprint(),
            checksums=checksums,
            phases={name: round(spent, 3) for name, spent in {**phases, "commit": time.perf_counter() - began}.items()},
            memory=dict(memory),
        )
        self._check_not_replaced()
        if self.store.commit(f"receipts/{shard_id:06d}.json", receipt.to_json()):
            return receipt
        committed = self.receipt(shard_id)
        if committed is None:
            raise InputError(f"{self.store.uri}: receipts/{shard_id:06d}.json was removed meanwhile; run again")
        # A store whose answer was lost, and that was asked again, has our own receipt: its parts must stay.
        if committed != receipt:
            for key in parts.values():
                self.store.delete(key)
        return committed

    def _check_not_replaced(self) -> None:
        """Raise InputError where another run has taken the place of one that had no results: its driver is dead."""
        data = self._read_if_there("run.json")
        if data is not None and self._began not in ("", str(json.loads(data).get("fingerprint"))):
            raise InputError(f"{self.store.uri}: another run has been begun here; leave it to that one")

    def read_part(self, receipt: Receipt, name: str) -> pa.Table:
        """Return one part of a committed shard; raises DamagedUnitError if it is not what was committed."""
        assert receipt.parts is not None
        key, number = receipt.parts.get(name, name), receipt.shard_id
        try:
            data = self._read_if_there(key)
            if data is None:
                raise DamagedError("gone")
            if receipt.checksums is not None:
                receipt.checksums[name].check(data)
            return from_bytes(data)
        except DamagedError as error:
            raise DamagedUnitError(self, key, str(error), f"receipts/{number:06d}.json") from error


def unit_of(key: str) -> int | None:
    """Return the number of the unit that an object belongs to; None if it was put there by others."""
    match = UNIT_KEY.fullmatch(key)
    return int(match[match.lastindex or 0]) if match else None


def _record(attempt: bytes) -> dict[str, Any]:
    """Return what is known of an attempt; nothing where that can't be read."""
    try:
        record = json.loads(attempt)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def check_same(before: dict[str, Any], now: dict[str, Any], uri: str) -> None:
    """Raise InputError, naming what differs, unless a run's info is that of the run that is asked for now."""
    if before["fingerprint"] == now["fingerprint"]:
        return
    old, new = before["result_settings"], now["result_settings"]
    changes = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    others = [name for name, digest in before["digests"].items() if digest != now["digests"].get(name)]
    if not changes and others == ["data"]:
        raise InputError(
            f"{uri}: holds a run of other data; choose another OUT, or take in what it has gained: mmray refresh {uri}"
        )
    changes += [f"other {name}" for name in others]
    raise InputError(f"{uri}: holds a run with other settings ({'; '.join(changes)}); choose another OUT")
