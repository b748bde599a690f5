"""Evaluations in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mmray.features.editing.labels import COMPARED, label_of
from mmray.features.evaluation.measures import measure_of
from mmray.terminal.tables import lineless, number

PROTOCOL_KINDS = ("legacy", "teacher-forced", "greedy")
"""The first of these words in a protocol sums it up."""


def measures(found: Mapping[str, Mapping[str, Any]], title: str, *, everything: bool = False) -> Table:
    """Return measures as a table: before, after, the interval of after, the number of samples, and the protocol.

    `everything` adds the measures of detail, each measure's better direction, and protocols in full.
    """
    columns = ("measure", "before", "after", "95 % interval", "n")
    table = lineless(*columns, left={"measure"}, title=Text(title, "bold"), gap=1)
    if everything:
        table.add_column("better", style="dim", no_wrap=True)
    # Only this column may shrink.
    table.add_column("protocol", style="dim", min_width=24 if everything else None)
    for name, row in found.items():
        measure = measure_of(name)
        if measure.detail and not everything:
            continue
        after = Text(number(row["after"]), "bold" if row["before"] != row["after"] else "")
        interval = "" if row["low"] is None else f"{number(row['low'])} – {number(row['high'])}"
        cells: list[RenderableType] = [name, number(row["before"]), after, interval, f"{row['n']:,}"]
        kind = next(kind for kind in PROTOCOL_KINDS if kind in row["protocol"])
        if everything:
            table.add_row(*cells, measure.better, Text(row["protocol"]))
        else:
            table.add_row(*cells, Text(kind, no_wrap=True, overflow="ellipsis"))
    return table


def comparison(edits: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return the measures of several edits: one row per measure that any of them has, one column per edit."""
    table = lineless("after the edit", left={"after the edit"})
    for edit in edits:
        table.add_column(edit, justify="right", overflow="fold")
    for name in COMPARED:
        rows = [found.get(name, {}) for found in edits.values()]
        if any(row.get("n") for row in rows):
            table.add_row(label_of(name), *(number(row["after"]) if row.get("n") else "–" for row in rows))
    return table
