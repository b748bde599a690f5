"""What an evaluation looks like in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

DIGITS = 3
HIDDEN = ("_span", "_legacy_top1", "_token")
"""Endings of measures that only `--all` shows."""


def measures(found: Mapping[str, Mapping[str, Any]], title: str, *, everything: bool = False) -> Table:
    """Return measures as a table: before, after, the interval of that after, how many samples, and the protocol."""
    table = Table(title=Text(title, "bold"), title_justify="left", box=None, header_style="dim", pad_edge=False)
    table.add_column("measure", no_wrap=True)
    for name in ("before", "after", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("protocol", style="dim", overflow="fold" if everything else "ellipsis", no_wrap=not everything)
    for name, row in found.items():
        if everything or not name.endswith(HIDDEN):
            interval = f"{number(row['low'])} – {number(row['high'])}" if row["low"] is not None else ""
            changed = row["before"] != row["after"]
            after = Text(number(row["after"]), "bold" if changed else "")
            table.add_row(name, number(row["before"]), after, interval, f"{row['n']:,}", row["protocol"])
    return table


def number(value: float | None) -> str:
    """Return a measure's value; a dash where there is none."""
    return "–" if value is None else f"{value:.{DIGITS}f}"
