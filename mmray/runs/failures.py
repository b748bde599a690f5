"""The samples of a job that failed, and their reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmray.runs.folder import RunFolder
from mmray.runs.receipts import Receipt

READERS = 16
"""Parts that are read in parallel."""
SPECIFICS = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d[\d,.]*")
"""Names and numbers in messages, by which failures with the same reason differ."""


@dataclass(frozen=True)
class Reason:
    """Samples that failed for one reason: stage and message of the first, and where all of them are in the data."""

    stage: str
    message: str
    sources: tuple[str, ...]


def committed_failures(
    folder: RunFolder, receipts: Iterable[Receipt], limit: int | None = None
) -> list[dict[str, Any]]:
    """Return the rows of `errors` that these units have committed, or the first `limit` of them."""
    failed = [receipt for receipt in receipts if receipt.failures]
    with ThreadPoolExecutor(READERS) as pool:
        # Each of these parts has at least one row: `limit` parts are enough.
        parts = pool.map(lambda receipt: folder.read_part(receipt, "errors"), failed[:limit])
        return [row for part in parts for row in part.to_pylist()][:limit]


def reasons(failures: Iterable[Mapping[str, Any]]) -> list[Reason]:
    """Group failures by reason, the most frequent first; messages that differ only in names and numbers are one."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in failures:
        groups.setdefault((row["stage"], SPECIFICS.sub("…", row["message"])), []).append(row)
    found = [Reason(rows[0]["stage"], rows[0]["message"], tuple(r["source"] for r in rows)) for rows in groups.values()]
    return sorted(found, key=lambda reason: -len(reason.sources))
