"""The folder of a run: which object lies where, how a shard is committed, and what its receipts say.

    run.json                          settings, fingerprint, versions, model, data digest: written once
    manifest.json                     which samples are in which shard: written once
    lease/000003.json                 who drives the run (`mmray.runs.lease`)
    refreshes/000001/                 what the data had gained (`mmray.runs.refreshes`)
    attempts/000012/1                 a worker began shard 12 for the first time; where, and what it died of
    shards/000012/5f3c-concepts.parquet   parts of shard 12, named by the attempt that wrote them
    receipts/000012.json              the receipt: names the parts; whichever attempt creates it first has committed
    aside/000012.json                 shard 12 was given up, and why
    tables/rankings.parquet           what readers read, made from the committed parts alone
    finished.json                     totals of the finished run

A part is complete before its receipt names it, and a receipt is created only if absent: a killed worker leaves nothing
but unnamed parts, and one that wakes up late can't replace what was committed. On a store that can't create only if
absent an object `commits-by-name` says so, and all commits are `mmray.storage.NamedCommits`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from mmray.errors import InputError
from mmray.runs.refreshes import latest
from mmray.storage import NamedCommits, PatientStore, Store, commits_once, is_outage, open_store
from mmray.tables import from_bytes, to_bytes

ATTEMPTS = 3
"""Times that a shard may be begun and not committed before it is set aside."""
BY_NAME = "commits-by-name"
"""Key whose presence says how this run's store commits."""


@dataclass(frozen=True)
class Receipt:
    """What a committed shard amounts to, and where its parts lie; `reason` is set instead when it was set aside."""

    shard_id: int
    samples: int = 0
    occurrences: int = 0
    failures: int = 0
    seconds: float = 0.0
    parts: dict[str, str] | None = None
    reason: str | None = None


class RunFolder:
    """One run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def at(cls, uri: str | Path, *, patient: bool = False) -> RunFolder:
        """Return the folder at a local path or `s3://bucket/prefix`, whether a run is there or not.

        A `patient` one waits out an outage of storage.
        """
        store = PatientStore(open_store(uri)) if patient else open_store(uri)
        return cls(NamedCommits(store) if store.exists(BY_NAME) else store)

    def begin(self, info: dict[str, Any], manifest: bytes) -> None:
        """Create the run, or join the one that is there; raises InputError if that has other settings.

        Of several that begin at once the first to commit run.json wins. The manifest comes after it, so that only
        those whose settings are the run's can write it, and theirs are equal. What is wrong with the store is told
        here, before any work.
        """
        before = self.info()
        if before is None:
            if not isinstance(self.store, NamedCommits) and not commits_once(self.store):
                self.store.put(BY_NAME, b"")
                self.store = NamedCommits(self.store)
            self.store.commit("run.json", json.dumps(info, indent=1, sort_keys=True).encode())
            before = self.info() or info
        check_same(before, info, self.store.uri)
        self.store.commit("manifest.json", manifest)

    def info(self) -> dict[str, Any] | None:
        """Return run.json, as refreshes have left it; None where no run has begun.

        Raises InputError if it is no run's.
        """
        try:
            info: dict[str, Any] = json.loads(self.store.read("run.json"))
            info["fingerprint"], info["result_settings"], info["digests"]
            info |= latest(self.store).info
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.store.uri}/run.json: not written by mmray; give another folder") from error
        return info

    def manifest(self) -> bytes:
        """Return the bytes of the manifest, with all that refreshes have added."""
        return self.store.read(latest(self.store).manifest)

    def receipts(self) -> dict[int, Receipt]:
        """Return the receipts of all committed shards by shard, in order."""
        return self._receipts("receipts/")

    def aside(self, committed: Collection[int] = ()) -> dict[int, Receipt]:
        """Return the shards that were given up, with their reasons; not those that a late worker has `committed`."""
        return {number: receipt for number, receipt in self._receipts("aside/").items() if number not in committed}

    def reasons(self, committed: Collection[int] = ()) -> dict[int, str]:
        """Return why shards were given up, by shard; not those that a late worker has `committed`."""
        return {number: receipt.reason or "" for number, receipt in self.aside(committed).items()}

    def _receipts(self, prefix: str) -> dict[int, Receipt]:
        keys = [entry.key for entry in self.store.list(prefix) if entry.key.endswith(".json")]
        with ThreadPoolExecutor(16) as pool:
            receipts = [Receipt(**json.loads(data)) for data in pool.map(self.store.read, keys)]
        return {receipt.shard_id: receipt for receipt in sorted(receipts, key=lambda receipt: receipt.shard_id)}

    def receipt(self, shard_id: int) -> Receipt | None:
        """Return a shard's receipt if it is committed."""
        try:
            return Receipt(**json.loads(self.store.read(f"receipts/{shard_id:06d}.json")))
        except FileNotFoundError:
            return None

    def attempt(self, shard_id: int) -> int:
        """Count an attempt in storage, where it outlives the worker, and return its number from 1."""
        number = 1
        worker = json.dumps({"worker": f"{socket.gethostname()}:{os.getpid()}"}).encode()
        while not self.store.commit(f"attempts/{shard_id:06d}/{number}", worker):
            number += 1
        return number

    def record_death(self, shard_id: int, number: int, reason: str) -> None:
        """Say what an attempt died of."""
        self.store.put(f"attempts/{shard_id:06d}/{number}", json.dumps({"reason": reason}).encode())

    def set_aside(self, shard_id: int, samples: int, reason: str = "") -> Receipt:
        """Give a shard up, for a reason that no further attempt would mend, or else the last that an attempt left."""
        if not reason:
            reasons = [
                json.loads(self.store.read(entry.key)).get("reason") or "the worker died without a word"
                for entry in self.store.list(f"attempts/{shard_id:06d}/")
            ]
            reason = f"given up after {ATTEMPTS} attempts: {reasons[min(ATTEMPTS, len(reasons)) - 1]}"
        receipt = Receipt(shard_id, samples=samples, reason=reason)
        self.store.commit(f"aside/{shard_id:06d}.json", json.dumps(asdict(receipt)).encode())
        return receipt

    def reopen(self, shards: Collection[int]) -> None:
        """Make a stopped run ready to go on with these shards, as if they had never been begun.

        An attempt that ended with its driver says nothing about the shard.
        """
        self.store.delete("finished.json")
        for entry in self.store.list("attempts/") + self.store.list("aside/"):
            if int(entry.key.split("/")[1].removesuffix(".json")) in shards:
                self.store.delete(entry.key)

    def commit_shard(self, shard_id: int, tables: dict[str, pa.Table], samples: int, seconds: float) -> Receipt:
        """Write the shard's parts, then its receipt; return the receipt that counts, which may be an earlier one."""
        token = uuid4().hex[:8]
        parts = {name: f"shards/{shard_id:06d}/{token}-{name}.parquet" for name in tables}
        try:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(lambda name: self.store.commit(parts[name], to_bytes(tables[name])), tables))
        except OSError as error:
            # A full disk must not be filled by one attempt after the other. (In an outage nothing can be removed.)
            if not is_outage(error):
                for key in parts.values():
                    self.store.delete(key)
            raise
        receipt = Receipt(
            shard_id,
            samples=samples,
            occurrences=len(tables.get("occurrences", ())),
            # A sample without a noun whose image can't be read either is two rows, and one sample.
            failures=len(set(tables["errors"]["source"].to_pylist())),
            seconds=round(seconds, 3),
            parts=parts,
        )
        if self.store.commit(f"receipts/{shard_id:06d}.json", json.dumps(asdict(receipt)).encode()):
            return receipt
        committed = self.receipt(shard_id)
        assert committed is not None
        # A store whose answer was lost, and that was asked again, has our own receipt: its parts must stay.
        if committed != receipt:
            for key in parts.values():
                self.store.delete(key)
        return committed

    def read_part(self, receipt: Receipt, name: str) -> pa.Table:
        """Return one part of a committed shard; raises InputError if somebody has removed it."""
        assert receipt.parts is not None
        try:
            return from_bytes(self.store.read(receipt.parts[name]))
        except FileNotFoundError as error:
            number = f"{receipt.shard_id:06d}"
            raise InputError(
                f"{self.store.uri}: {receipt.parts[name]} is gone; remove receipts/{number}.json too and run again"
            ) from error

    def read_parts(self, receipts: Mapping[int, Receipt], name: str, schema: pa.Schema) -> pa.Table:
        """Return one part of all these shards, put together."""
        return pa.concat_tables(
            [schema.empty_table(), *(self.read_part(receipt, name) for receipt in receipts.values())]
        )

    def finish(self, totals: dict[str, Any]) -> None:
        """Say that the tables are complete, and what they amount to."""
        self.store.put("finished.json", json.dumps(totals, indent=1).encode())

    def finished(self) -> dict[str, Any] | None:
        """Return the totals of a finished run; None while it is not."""
        try:
            totals: dict[str, Any] = json.loads(self.store.read("finished.json"))
        except FileNotFoundError:
            return None
        return totals


def receipts_digest(receipts: Mapping[int, Receipt]) -> str:
    """Return a digest of which shards are committed, and by which attempt each."""
    facts = json.dumps([[number, receipt.parts] for number, receipt in sorted(receipts.items())], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


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
