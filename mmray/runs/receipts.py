"""Receipts: what a committed unit amounts to, where its parts lie, and what tells them from any others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mmray.errors import DamagedError
from mmray.storage import Checksum


@dataclass(frozen=True)
class Receipt:
    """What a committed shard amounts to, and where its parts lie; `reason` is set instead when it was quarantined."""

    shard_id: int
    samples: int = 0
    occurrences: int = 0
    failures: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples that were counted and kept, but have nothing to rank neurons for, by reason; these are no failures."""
    seconds: float = 0.0
    parts: dict[str, str] | None = None
    reason: str | None = None
    run: str = ""
    """Fingerprint that the run began with; receipts of earlier versions have none."""
    checksums: dict[str, Checksum] | None = None
    """Of each part; receipts of earlier versions have none."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of the work: read, forward, …, as far as the job times them; and of `AROUND`."""
    memory: dict[str, int] = field(default_factory=dict)
    """The most bytes that the worker had held by then: `host`, `gpu`."""

    def to_json(self) -> bytes:
        """Return the bytes of the receipt's file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Receipt:
        """Return the receipt in a file, without what later versions have added; raises DamagedError for no receipt."""
        try:
            content = known_fields(cls, json.loads(data))
            if content.get("checksums") is not None:
                content["checksums"] = {name: Checksum(**value) for name, value in content["checksums"].items()}
            receipt = cls(**content)
            counts = (receipt.shard_id, receipt.samples, receipt.occurrences, receipt.failures)
            if not all(isinstance(count, int) for count in counts) or not isinstance(receipt.parts, dict | None):
                raise TypeError
            # Such as are added up.
            cost([receipt])
            skipped([receipt])
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedError("not a receipt, or a cut one") from error
        return receipt

    def check(self, number: int, run: str, units: int | None) -> None:
        """Raise DamagedError unless this is the receipt of that unit of that run, which has so many units."""
        if self.shard_id != number:
            raise DamagedError(f"the receipt of unit {self.shard_id}")
        if units is not None and number >= units:
            raise DamagedError(f"the run has {units:,} units")
        if run and self.run and self.run != run:
            raise DamagedError("the receipt of another run")
        if self.reason is None and not self.parts:
            raise DamagedError("names no parts")
        for key in (self.parts or {}).values():
            if not key.startswith(f"shards/{number:06d}/"):
                raise DamagedError(f"names {key}, a part of another unit")


def skipped(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return how many samples of these units were skipped, by reason."""
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.skipped)
    return dict(counts)


@dataclass(frozen=True)
class Cost:
    """What units took, in all, of the workers' time; and what the largest worker held."""

    seconds: float
    phases: dict[str, float]
    """Seconds by phase, the longest first, as far as the work is timed."""
    memory: dict[str, int]
    """Bytes at most: `host`, `gpu`."""


AROUND = ("load", "wait", "commit")
"""Phases before and after a unit's work, which its `seconds` leave out."""
NOTHING = Cost(0.0, {}, {})


def cost(receipts: Iterable[Receipt]) -> Cost:
    """Return what these units took."""
    seconds, phases, memory = 0.0, Counter[str](), Counter[str]()
    for receipt in receipts:
        seconds += receipt.seconds
        phases.update(receipt.phases)
        memory |= Counter(receipt.memory)
    return Cost(round(seconds, 3), {name: round(value, 3) for name, value in phases.most_common()}, dict(memory))


def receipts_digest(receipts: Mapping[int, Receipt]) -> str:
    """Return a digest of which shards are committed, and by which attempt each."""
    facts = json.dumps([[number, receipt.parts] for number, receipt in sorted(receipts.items())], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def known_fields(kind: Any, content: Any) -> dict[str, Any]:
    """Return what a dataclass of this version knows of a JSON object; raises TypeError for anything but an object."""
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__} instead of an object")
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in content.items() if name in names}
