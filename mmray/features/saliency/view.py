"""Measures of saliency in the terminal."""

from __future__ import annotations

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from mmray.terminal.figures import number


def saliency(rows: pa.Table) -> Table:
    """Return measures with 95 % intervals: a row per method, the best at pointing first."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["method"], {})[row["measure"]] = row
    measures = list(dict.fromkeys(rows["measure"].to_pylist()))
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 2, 0, 0)
    table.add_column("method", no_wrap=True)
    for name in measures:
        table.add_column(name.replace("_", " "), justify="right")
    for method, own in sorted(found.items(), key=lambda pair: -pair[1].get(measures[0], {}).get("value", 0.0)):
        table.add_row(method, *(_cell(own.get(name)) for name in measures))
    return table


def _cell(row: dict[str, float] | None) -> Text:
    if row is None:
        return Text("–")
    return Text(number(row["value"])).append(f" {row['low']:.2f}–{row['high']:.2f}", "dim")
