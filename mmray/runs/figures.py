"""Figures of a run's tables for notebooks, as plotly objects: what the report's pages draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from mmray.errors import InputError

if TYPE_CHECKING:
    from mmray.runs.run import Run

HIGHEST = 10
"""Neurons of a concept whose layers are counted."""
LAYER_ORDERS = {"score": "#5b5bd6", "specific": "#0a776d"}
"""Orders that layers are compared by, with their colours."""
METHODS = {
    "score": ("highest by score", "#5b5bd6", "solid"),
    "specific": ("highest by specific", "#0a776d", "solid"),
    "layer-matched": ("random, same layers", "#a5a8b0", "solid"),
    "activation-matched": ("random, like activations", "#a5a8b0", "dash"),
    "uniform": ("random", "#a5a8b0", "dot"),
}
"""Method → its name, colour and line, as in the report."""
OTHER = ("#d97706", "solid")
"""Colour and line of a method that is not among them."""


def layer_shares(run: Run, concept: str | None = None) -> dict[str, list[float]]:
    """Return by order the fraction of the ten highest neurons in each layer, of one concept or of all (None)."""
    # Quotes are doubled: that of a concept such as o'clock would end the string.
    own = "" if concept is None else "where concept = '{}'".format(concept.replace("'", "''"))
    counts = ", ".join(
        f"count(*) filter (where {rank} <= {HIGHEST}) as {order}"
        for order, rank in zip(LAYER_ORDERS, ("rank", "specific_rank"), strict=True)
    )
    found = {
        row["layer"]: row for row in run.sql(f"select layer, {counts} from rankings {own} group by layer").to_pylist()
    }
    layers = range(len(run.info["model"]["widths"]))
    shares = {}
    for order in LAYER_ORDERS:
        numbers = [found[layer][order] if layer in found else 0 for layer in layers]
        # Fractions, because data decides how many concepts there are.
        shares[order] = [number / (sum(numbers) or 1) for number in numbers]
    return shares


def plot_layers(run: Run, concept: str | None) -> go.Figure:
    """Return the figure of `layer_shares`."""
    figure = go.Figure()
    for order, shares in layer_shares(run, concept).items():
        names = [f"L{layer}" for layer in range(len(shares))]
        figure.add_bar(x=names, y=shares, name=f"by {order}", marker_color=LAYER_ORDERS[order])
    of = "all concepts" if concept is None else concept
    figure.update_layout(title=f"Layers of the {HIGHEST} highest neurons of {of}", barmode="group")
    figure.update_yaxes(tickformat=".0%", title=f"of the {HIGHEST} highest")
    return figure


def plot_dose(run: Run, concept: str | None, measure: str) -> go.Figure:
    """Return the figure of a causal measure by the number of neurons, a line per method, with 95 % intervals.

    Raises InputError for a measure that depends on no number of neurons, and as `Run.properties`.
    """
    rows: list[dict[str, Any]] = [row for row in run.properties(concept).to_pylist() if row["neurons"] is not None]
    measures = sorted({row["measure"] for row in rows if len(_doses(rows, row["measure"])) > 1})
    if measure not in measures:
        of = "over all concepts" if concept is None else f"of {concept!r}"
        others = f"there are {', '.join(measures)}" if measures else "mmray properties RUN measures more concepts"
        raise InputError(f"no measure {measure!r} {of} by the number of neurons; {others}")
    figure = go.Figure()
    own = [row for row in rows if row["measure"] == measure]
    found = dict.fromkeys(row["method"] for row in own)
    # Known methods in the order of their table, then others as they come.
    for method in sorted(found, key=lambda name: list({**METHODS, **found}).index(name)):
        line = sorted((row for row in own if row["method"] == method), key=lambda row: row["neurons"])
        name, colour, dash = METHODS.get(method, (method, *OTHER))
        figure.add_scatter(
            x=[row["neurons"] for row in line],
            y=[row["value"] for row in line],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_above(row["high"], row["value"]) for row in line],
                "arrayminus": [_above(row["value"], row["low"]) for row in line],
            },
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
        )
    figure.update_layout(title=f"{measure} of {'all concepts' if concept is None else concept}")
    figure.update_xaxes(title="neurons", type="log")
    figure.update_yaxes(title=measure, rangemode="tozero")
    return figure


def _doses(rows: list[dict[str, Any]], measure: str) -> set[int]:
    return {row["neurons"] for row in rows if row["measure"] == measure}


def _above(high: float | None, low: float | None) -> float:
    return 0.0 if high is None or low is None else high - low
