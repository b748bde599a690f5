"""Terminal view of the properties: each measure with its controls."""

from __future__ import annotations

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from mmray.runs.run import Run
from mmray.terminal.tables import lineless, number

LOCATED = ("score", "specific", "image", "contribution", "unsigned", "gate")
"""Methods that choose neurons for the concept; all others are controls."""


def properties(rows: pa.Table) -> Table:
    """Return the measures over all concepts as a table, with those of located neurons in bold."""
    columns = ("measure", "neurons", "of them", "value", "95 % interval", "n")
    table = lineless(*columns, left={"measure", "neurons"}, gap=1)
    previous: tuple[str, str] = ("", "")
    for row in rows.to_pylist():
        if row["property"] != previous[0]:
            table.add_row(Text(row["property"].replace("_", " "), "bold"))
        same = (row["property"], row["measure"]) == previous
        previous = row["property"], row["measure"]
        style = "bold" if row["method"] in LOCATED else ""
        # Of noise and amplification only; zeroing has no strength.
        strength = "" if row["strength"] is None else f" × {row['strength']:g}"
        table.add_row(
            "" if same else f"  {row['measure'].replace('_', ' ')}",
            Text(row["method"], style),
            f"{row['neurons'] or ''}{strength}",
            Text(number(row["value"]), style),
            "" if row["low"] is None else f"{number(row['low'])} – {number(row['high'])}",
            f"{row['n']:,}",
        )
    return table


def findings(run: Run) -> list[str]:
    """Return the main results in a few lines: the words neurons write, the effect of zeroing them, where maps peak."""
    found = {(row["measure"], row["method"], row["neurons"]): row for row in run.properties().to_pylist()}
    lines = []
    if hit := found.get(("lemma_hit_rate", "score", 10)):
        floor = found["lemma_hit_rate", "uniform", 10]["value"]
        lines.append(
            f"of {hit['n']} concepts, {hit['value']:.1%} are written by one of their ten highest neurons, and "
            f"{floor:.1%} by one of ten random neurons"
        )
    if own := found.get(("zeroed_own", "score", 100)):
        # Only runs with all measures get here: these rows are written together.
        other, matched = found["zeroed_other", "score", 100], found["zeroed_own", "layer-matched", 100]
        lines.append(
            f"zeroing the 100 highest lowers P(noun) by {own['value']:z.3f} and P(other nouns) by "
            f"{other['value']:z.3f}; random ones of the same layers lower P(noun) by {matched['value']:z.3f}"
        )
    if chance := found.get(("pointing_game", "chance", 10)):
        # The better of the two rankings, which the text names.
        point, by = max((found["pointing_game", name, 10]["value"], name) for name in ("score", "specific"))
        lines.append(
            f"in {chance['n']:,} images of several objects, the map of the ten highest by {by} peaks on the right "
            f"object in {point:.0%}; chance: {chance['value']:.0%}"
        )
    return lines
