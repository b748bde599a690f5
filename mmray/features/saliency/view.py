"""Measures of saliency in the terminal."""

from __future__ import annotations

import pyarrow as pa
from rich.table import Table

from mmray.terminal.tables import lineless, measured


def saliency(rows: pa.Table) -> Table:
    """Return measures with 95 % intervals: a row per method, the best at pointing first."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["method"], {})[row["measure"]] = row
    measures = list(dict.fromkeys(rows["measure"].to_pylist()))
    table = lineless("method", *(name.replace("_", " ") for name in measures), left={"method"})
    for method, own in sorted(found.items(), key=lambda pair: -pair[1].get(measures[0], {}).get("value", 0.0)):
        table.add_row(method, *(measured(own.get(name)) for name in measures))
    return table
