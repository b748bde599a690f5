"""Second opinions and perturbations in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mmray.terminal.tables import lineless, measured, number

SHOWN_MISTAKES = 10
Row = Mapping[str, Any]


def opinions(measures: Sequence[Row]) -> Table:
    """Return measures of second opinions: a row per kind of claim and judge, AUROC with its 95 % interval."""
    names = {"auroc": "AUROC", "ece": "calibration error", "confirmed_true": "sure of", "confirmed_false": "of false"}
    table = lineless("claims", "judge", "true", *names.values(), "n", left={"claims", "judge"})
    for claims in dict.fromkeys(row["claims"] for row in measures):
        found = {(row["judge"], row["measure"]): row for row in measures if row["claims"] == claims}
        true = measured(found.get((None, "true")), interval=False)
        for judge in dict.fromkeys(judge for judge, name in found if judge and name in names):
            values = [measured(found.get((judge, name)), interval=name == "auroc") for name in names]
            # A judge's first measure is its AUROC, over all claims; means by truth are over fewer.
            count = next(row["n"] for (own, _), row in found.items() if own == judge)
            table.add_row(claims, judge, true, *values, f"{count:,}")
            true = Text()  # the share of true claims does not depend on the judge
    return table


def mistakes(found: Sequence[Row]) -> Table:
    """Return wrong claims: both confidences, and the object that is there."""
    words = ("claimed", "present", "said")
    table = lineless(*words, "detector", "log-probability", left=words)
    # Captions may be long.
    table.columns[2].no_wrap = False
    for row in found[:SHOWN_MISTAKES]:
        table.add_row(
            row["word"], row["mistaken_for"] or "–", row["text"], number(row["confidence"]), number(row["log_prob"])
        )
    return table


def probe(measures: Sequence[Row]) -> Table:
    """Return who says which mentions are hallucinated: a row per judge, AUROC with its 95 % interval."""
    table = lineless("judge", "neurons", "AUROC", "caught", "n", left={"judge"})
    found = {(row["judge"], row["measure"]): row for row in measures}
    for (judge, measure), row in found.items():
        if measure != "caught":
            neurons = "" if row["neurons"] is None else f"{row['neurons']:,}"
            caught = measured(found.get((judge, "caught")))
            table.add_row(judge, neurons, measured(row), caught, f"{row['n']:,}")
    return table


def doses(rows: Sequence[Row]) -> Table:
    """Return what interventions do: a row per intervention, CHAIR with its 95 % interval."""
    shown = ("chair_i", "chair_s", "recall", "length", "pope_accuracy", "perplexity")
    table = lineless("neurons", "change", "count", *shown, left={"neurons", "change"})
    keys = dict.fromkeys((row["neurons"], row["change"], row["dose"], row["count"]) for row in rows)
    for key in keys:
        own = {row["measure"]: row for row in rows if (row["neurons"], row["change"], row["dose"], row["count"]) == key}
        neurons, change, dose, count = key
        said = "" if change is None else change if dose is None else f"{change} {dose:g}"
        values = [measured(own.get(name), interval=name == "chair_i") for name in shown]
        table.add_row(neurons, said, f"{count:,}", *values)
    return table


def bias(rows: Sequence[Row]) -> Table:
    """Return shifts of answers: a row per pair, question and condition, with what could not be read."""
    words = ("pair", "question", "condition")
    table = lineless(*words, "before", "shift", "n", "unread", left=words)
    # Questions may be long.
    table.columns[1].no_wrap = False
    for row in rows:
        unread = f"{row['unread_before']:,} + {row['unread_after']:,}"
        table.add_row(
            f"{row['source']} → {row['target']}",
            row["question"],
            row["condition"],
            number(row["before"]),
            measured(row),
            f"{row['n']:,}",
            unread,
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
    table = lineless("condition", *shown, left={"condition"})
    for one in conditions:
        table.add_row(
            one, *(measured(found.get((one, *key)), interval=name == "turned") for name, key in shown.items())
        )
    return table
