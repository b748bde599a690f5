"""Terminal view of the benchmark: the paper's table, methods by measures."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from mmray.features.mmedit.summary import BEYOND, FIVE, HARMONIC, PROTOCOLS
from mmray.terminal.tables import lineless, measured

SHORT = {
    "reliability": "Reliability",
    "text_generality": "T-Gen",
    "image_generality": "M-Gen",
    "text_locality": "T-Loc",
    "image_locality": "M-Loc",
    HARMONIC: "harmonic",
    "portability": "Portability",
    "random_image_locality": "RI-Loc",
    "no_image_locality": "NI-Loc",
    "consistent_image_locality": "CI-Loc",
}
"""Measure → its column, as in the papers."""


def tables(rows: pa.Table) -> Iterator[Table]:
    """Yield a table per task and protocol, and one of what is measured beyond the paper, for each."""
    found = rows.to_pylist()
    for task in dict.fromkeys(row["task"] for row in found):
        for protocol in PROTOCOLS:
            yield _table(found, task, protocol, (*FIVE, HARMONIC))
        yield _table(found, task, "corrected", BEYOND)


def _table(rows: list[dict[str, object]], task: str, protocol: str, measures: tuple[str, ...]) -> Table:
    some = {
        (str(row["method"]), row["edits"], str(row["measure"])): row
        for row in rows
        if (row["task"], row["protocol"]) == (task, protocol)
    }
    shown = [name for name in measures if any(key[2] == name for key in some)]
    n = max((int(str(row["n"])) for row in some.values()), default=0)
    title = Text(f"{task}, {protocol}, {n} images", "bold")
    table = lineless("method", *(SHORT[name] for name in shown), left={"method"}, title=title)
    for method, edits in dict.fromkeys((method, edits) for method, edits, _ in some):
        name = method if edits == 1 else f"{method}, {edits} edits"
        table.add_row(name, *(measured(some.get((method, edits, one))) for one in shown))
    return table
