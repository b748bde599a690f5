"""Second opinions and perturbations in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mmray.terminal.figures import number

SHOWN_MISTAKES = 10
Row = Mapping[str, Any]


def opinions(measures: Sequence[Row]) -> Table:
    """Return measures of second opinions: a row per kind of claim and judge, AUROC with its 95 % interval."""
    names = {"auroc": "AUROC", "ece": "calibration error", "confirmed_true": "sure of", "confirmed_false": "of false"}
    table = _table("claims", "judge", numbers=("true", *names.values(), "n"))
    for claims in dict.fromkeys(row["claims"] for row in measures):
        found = {(row["judge"], row["measure"]): row for row in measures if row["claims"] == claims}
        true = _value(found.get((None, "true")))
        for judge in dict.fromkeys(judge for judge, name in found if judge and name in names):
            values = [_value(found.get((judge, name)), interval=name == "auroc") for name in names]
            count = next(row["n"] for (own, _), row in found.items() if own == judge)
            table.add_row(claims, judge, true, *values, f"{count:,}")
            true = Text()  # the share of true claims does not depend on the judge
    return table


def mistakes(found: Sequence[Row]) -> Table:
    """Return wrong claims: both confidences, and the object that is there."""
    table = _table("claimed", "stands there", "said", numbers=("detector", "log-probability"))
    for row in found[:SHOWN_MISTAKES]:
        table.add_row(
            row["word"], row["mistaken_for"] or "–", row["text"], number(row["confidence"]), number(row["log_prob"])
        )
    return table


def changes(measures: Sequence[Row]) -> Table:
    """Return measures of change: a row per condition, `turned` with its 95 % interval."""
    columns = {
        "turned": (None, "followed"),
        "source": ("source", "followed"),
        "target": ("target", "followed"),
        "changed": (None, "changed"),
        "shift": (None, "shift"),
        "unread": (None, "unparsable"),
        "norm": (None, "relative_norm"),
    }
    conditions = dict.fromkeys(row["condition"] for row in measures)
    found = {(row["condition"], row["about"], row["measure"]): row for row in measures}
    shown = {name: key for name, key in columns.items() if any((one, *key) in found for one in conditions)}
    table = _table("condition", numbers=tuple(shown))
    for one in conditions:
        table.add_row(one, *(_value(found.get((one, *key)), interval=name == "turned") for name, key in shown.items()))
    return table


def _table(*words: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for word in words:
        table.add_column(word)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _value(row: Row | None, *, interval: bool = False) -> Text:
    """Return a measure's value, on request with its interval; a dash where it has none."""
    if row is None or row["value"] is None:
        return Text("–")
    text = Text(number(row["value"]))
    return text.append(f" {row['low']:.2f}–{row['high']:.2f}", "dim") if interval and row["low"] is not None else text
