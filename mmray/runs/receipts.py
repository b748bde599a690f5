"""Receipts of committed and quarantined units: counts, keys and checksums of their parts, and what they cost."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mmray.errors import DamagedError
from mmray.storage import Checksum

UNIT_KEY = re.compile(r"(?:receipts|aside)/(\d{6,})\.json|attempts/(\d{6,})/\d+|shards/(\d{6,})/[^/]+\.parquet")
"""Keys of objects that belong to a unit. All other objects are not ours, and are left alone."""


@dataclass(frozen=True)
class Receipt:
    """Counts of a committed shard and the keys of its parts; a quarantined one has a `reason` instead."""

    shard_id: int
    samples: int = 0
    occurrences: int = 0
    failures: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples with nothing to rank neurons for, by reason; they are counted in `samples`, and are no failures."""
    seconds: float = 0.0
    parts: dict[str, str] | None = None
    reason: str | None = None
    run: str = ""
    """Fingerprint that the run began with; empty in receipts of earlier versions."""
    checksums: dict[str, Checksum] | None = None
    """Of each part; None in receipts of earlier versions."""
    bounds: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Of each part whose rows are ordered: lowest and highest value of each column by which they are."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds per phase: those that the job times (read, forward, …), and `AROUND`."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes of the worker so far: `host`, `gpu`."""
    notes: list[str] = field(default_factory=list)
    """Why it took longer than it could have, one line each."""

    def to_json(self) -> bytes:
        """Return the bytes of the receipt's file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Receipt:
        """Return the receipt in a file, ignoring fields of later versions; raises DamagedError for anything else."""
        try:
            content = known_fields(cls, json.loads(data))
            if content.get("checksums") is not None:
                content["checksums"] = {name: Checksum(**value) for name, value in content["checksums"].items()}
            receipt = cls(**content)
            counts = (receipt.shard_id, receipt.samples, receipt.occurrences, receipt.failures)
            if not all(isinstance(count, int) for count in counts) or not isinstance(receipt.parts, dict | None):
                raise TypeError
            if not all(isinstance(bounds, dict) for bounds in [receipt.bounds, *receipt.bounds.values()]):
                raise TypeError
            # Adding them up checks that all values are numbers.
            cost([receipt])
            skipped([receipt])
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedError("not a receipt, or a truncated one") from error
        return receipt

    def check(self, number: int, run: str, units: int | None) -> None:
        """Raise DamagedError unless this receipt belongs to this unit of this run, which has `units` units."""
        if self.shard_id != number:
            raise DamagedError(f"the receipt of unit {self.shard_id}")
        if units is not None and number >= units:
            raise DamagedError(f"the run has {units:,} units")
        # Receipts of earlier versions do not say which run they are of.
        if run and self.run and self.run != run:
            raise DamagedError("the receipt of another run")
        if self.reason is None and not self.parts:
            raise DamagedError("names no parts")
        # Keys come from a file that anyone may have edited, and lead to what is read and swept.
        for key in (self.parts or {}).values():
            if not key.startswith(f"shards/{number:06d}/"):
                raise DamagedError(f"names {key}, a part of another unit")


def unit_of(key: str) -> int | None:
    """Return the number of the unit that an object belongs to; None if it is not ours."""
    match = UNIT_KEY.fullmatch(key)
    return int(match[match.lastindex or 0]) if match else None


def skipped(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return how many samples of these units were skipped, by reason."""
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.skipped)
    return dict(counts)


@dataclass(frozen=True)
class Cost:
    """Total worker time of units, the peak memory of the largest worker, and why it was not less."""

    seconds: float
    phases: dict[str, float]
    """Seconds by phase, longest first; covers only what the job times."""
    memory: dict[str, int]
    """Peak bytes: `host`, `gpu`."""
    notes: tuple[str, ...] = ()
    """Different notes of the units."""


AROUND = ("load", "wait", "commit")
"""Phases before and after a unit's work, which its `seconds` don't include."""
NO_COST = Cost(0.0, {}, {})


def cost(receipts: Iterable[Receipt]) -> Cost:
    """Return the total cost of these units."""
    seconds, phases, memory = 0.0, Counter[str](), Counter[str]()
    notes: dict[str, None] = {}
    for receipt in receipts:
        seconds += receipt.seconds
        phases.update(receipt.phases)
        memory |= Counter(receipt.memory)  # the union of counters takes the maximum
        notes |= dict.fromkeys(receipt.notes)
    by_phase: dict[str, float] = {name: round(value, 3) for name, value in phases.most_common()}
    return Cost(round(seconds, 3), by_phase, dict(memory), tuple(notes))


def receipts_digest(receipts: Mapping[int, Receipt]) -> str:
    """Return a digest of which shards are committed, and by which attempt each."""
    # Keys of parts name the attempt: a unit that was done again changes the digest.
    attempts = json.dumps([[number, receipt.parts] for number, receipt in sorted(receipts.items())], sort_keys=True)
    return hashlib.sha256(attempts.encode()).hexdigest()[:16]


def known_fields(kind: Any, content: Any) -> dict[str, Any]:
    """Return the entries of a JSON object that are fields of a dataclass; raises TypeError for any other JSON."""
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__} instead of an object")
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in content.items() if name in names}
