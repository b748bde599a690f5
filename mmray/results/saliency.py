"""What measures of saliency look like in the terminal: a row a method."""

from __future__ import annotations

import pyarrow as pa
from rich.table import Table

from mmray.results.evaluation import number


def saliency(rows: pa.Table) -> Table:
    """Return the measures as a table: a row a method, those that point best first."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["method"], {})[row["measure"]] = row
    measures = list(dict.fromkeys(rows["measure"].to_pylist()))
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("method", no_wrap=True)
    for name in measures:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
        table.add_column("95 %", justify="right", no_wrap=True, style="dim")
    for method, own in sorted(found.items(), key=lambda pair: -pair[1].get(measures[0], {}).get("value", 0.0)):
        cells = []
        for name in measures:
            row = own.get(name)
            cells += ["–", ""] if row is None else [number(row["value"]), f"{row['low']:.2f}–{row['high']:.2f}"]
        table.add_row(method, *cells)
    return table
