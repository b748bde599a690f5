"""Tables of measures in the terminal: their look, their numbers and their intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def lineless(*columns: str, left: Collection[str] = (), title: Text | None = None, gap: int = 2) -> Table:
    """Return an empty table without lines; columns not aligned `left` are aligned right, `gap` spaces apart."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    table.padding = (0, gap, 0, 0)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    """Return a measure with three decimals, without a negative zero; a dash for None."""
    return "–" if value is None else f"{value:z.3f}"


def measured(row: Mapping[str, Any] | None, *, interval: bool = True) -> Text:
    """Return a measure's value with its 95 % interval; a dash if it has no value."""
    if row is None or row["value"] is None:
        return Text("–")
    text = Text(number(row["value"]))
    return text.append(f" {row['low']:.2f}–{row['high']:.2f}", "dim") if interval and row["low"] is not None else text
