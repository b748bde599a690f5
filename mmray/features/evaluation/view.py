"""What an evaluation looks like in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mmray.terminal.figures import number

HIDDEN = ("_span", "_legacy_top1", "_token", "_unparsable")
"""Endings of measures that only `--all` shows."""
KINDS = ("legacy", "teacher-forced", "greedy")
"""Words of a protocol that say in one what it does."""


def measures(found: Mapping[str, Mapping[str, Any]], title: str, *, everything: bool = False) -> Table:
    """Return measures as a table: before, after, the interval of that after, how many samples, and the protocol.

    Protocols are one word each, or all their words with `everything`, which also shows the measures left out else.
    """
    table = Table(title=Text(title, "bold"), title_justify="left", box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("measure", no_wrap=True)
    for name in ("before", "after", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    # Only this column may shrink.
    table.add_column("protocol", style="dim", min_width=24 if everything else None)
    for name, row in found.items():
        if everything or not name.endswith(HIDDEN):
            after = Text(number(row["after"]), "bold" if row["before"] != row["after"] else "")
            interval = "" if row["low"] is None else f"{number(row['low'])} – {number(row['high'])}"
            words = row["protocol"]
            short = Text(next(kind for kind in KINDS if kind in words), no_wrap=True, overflow="ellipsis")
            last = Text(words) if everything else short
            table.add_row(name, number(row["before"]), after, interval, f"{row['n']:,}", last)
    return table


COMPARED = (
    "reliability",
    "image_generality",
    "text_generality",
    "image_locality",
    "text_locality",
    "hallucination",
    "chair_i",
    "recall",
)
"""Measures that edits are put side by side by."""


def comparison(edits: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return the measures of several edits after them: a row a measure that any of them has, a column an edit."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 2, 0, 0)
    table.add_column("after the edit", no_wrap=True)
    for edit in edits:
        table.add_column(edit, justify="right", overflow="fold")
    for name in COMPARED:
        rows = [found.get(name, {}) for found in edits.values()]
        if any(row.get("n") for row in rows):
            table.add_row(name.replace("_", " "), *(number(row["after"]) if row.get("n") else "–" for row in rows))
    return table
