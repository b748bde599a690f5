"""What properties look like in the terminal: each measure beside its controls."""

from __future__ import annotations

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from mmray.results.evaluation import number

LOCATED = ("score", "specific", "image", "contribution", "published")
"""Methods that chose neurons for the concept; all others are controls."""


def properties(rows: pa.Table) -> Table:
    """Return the measures over all concepts as a table, the located neurons' in bold."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for name in ("property", "measure", "neurons", "n", "strength", "value", "95 % interval", "images"):
        table.add_column(name, justify="left" if name in ("property", "measure", "neurons") else "right", no_wrap=True)
    before = ""
    for row in rows.to_pylist():
        title = row["property"].replace("_", " ") if row["property"] != before else ""
        before = row["property"]
        style = "bold" if row["method"] in LOCATED else ""
        interval = "" if row["low"] is None else f"{number(row['low'])} – {number(row['high'])}"
        table.add_row(
            Text(title, "bold"),
            row["measure"].replace("_", " "),
            Text(row["method"], style),
            str(row["neurons"] or ""),
            "" if row["strength"] is None else f"{row['strength']:g}",
            Text(number(row["value"]), style),
            interval,
            f"{row['n']:,}",
        )
    return table
