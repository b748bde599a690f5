"""What second opinions and moved embeddings look like in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from mmray.results.evaluation import number

SHOWN_MISTAKES = 10
Row = Mapping[str, Any]


def opinions(measures: Sequence[Row]) -> Table:
    """Return the measures of second opinions, the detector's beside the language model's own confidence."""
    table = _table("claims", "measure", "judge", numbers=("value", "95 % interval", "n"))
    for row in measures:
        if row["measure"] != "reliability":
            name = row["measure"].replace("_", " ")
            table.add_row(row["claims"], name, row["judge"] or "", *_numbers(row), row["protocol"])
    return table


def mistakes(found: Sequence[Row]) -> Table:
    """Return what was claimed, with both confidences, and what stands there."""
    table = _table("claimed", "stands there", "said", numbers=("detector", "log-probability"))
    for row in found[:SHOWN_MISTAKES]:
        table.add_row(
            row["word"], row["mistaken_for"] or "–", row["text"], number(row["confidence"]), number(row["log_prob"]), ""
        )
    return table


def changes(measures: Sequence[Row]) -> Table:
    """Return what changed under every condition."""
    table = _table("condition", "about", "measure", numbers=("value", "95 % interval", "n"))
    for row in measures:
        name = row["measure"].replace("_", " ")
        table.add_row(row["condition"], row["about"] or "all", name, *_numbers(row), row["protocol"])
    return table


def _table(*words: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for word in words:
        table.add_column(word)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True, overflow="ellipsis")
    return table


def _numbers(row: Row) -> tuple[str, str, str]:
    interval = "" if row["low"] is None else f"{number(row['low'])} – {number(row['high'])}"
    return number(row["value"]), interval, f"{row['n']:,}"
