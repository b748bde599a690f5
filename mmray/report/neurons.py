"""Neurons in the report: what they write, their concepts, extreme samples and activity; and the profile of layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import pyarrow.compute as pc

from mmray.report.concepts import among, number
from mmray.report.section import map_of
from mmray.runs.examples import example_rows
from mmray.runs.figures import layer_shares
from mmray.runs.run import Run

EXAMPLES = 5
"""Samples with the highest activations per neuron, and with the lowest."""
CONCEPTS = 15
"""Concepts on a neuron's page."""
LABELS = 40
"""Rows of activity on a page; data with more labels shows those where the neuron is most active."""
FEW = 32
"""Neurons that are looked up one by one."""
OPEN = "sum(n_active) filter (where modality = '{0}') / sum(n_tokens) filter (where modality = '{0}') as {0}"
"""SQL of the fraction of a modality's tokens at which neurons are open."""


def neuron_pages(
    run: Run, names: Collection[str], uses: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return the page of each of these neurons; `uses` has the rows on its concepts (`uses_of`)."""
    examples = _examples(run, names)
    activity = _activity(run, names)
    maps = _maps(run, names)
    pages = {}
    for row in run.rows("neurons", of_neurons(run, names)).to_pylist():
        name = row["neuron"]
        # Of many neurons the condition above lets others through.
        if name in names:
            numbers = {key: number(row[key]) for key in ("mean", "std", "min", "max")}
            pages[name] = numbers | {
                "neuron": name,
                "layer": row["layer"],
                "tokens": row["tokens"],
                "suppressed": row["suppressed"],
                "open": number(row["n_active"] / max(row["n_tokens"], 1)),
                "n_tokens": row["n_tokens"],
                "n_concepts": row["n_concepts"],
                "concepts": uses.get(name, ()),
                "examples": examples[name],
                "activity": activity[name],
                "maps": maps[name],
            }
    return pages


def of_neurons(run: Run, names: Collection[str]) -> pc.Expression:
    """Return a condition that holds for the rows of these neurons; of many neurons, for few others too."""
    pairs = [run.names.parse(name) for name in names]
    if 0 < len(pairs) <= FEW:
        # Row groups without any of them are found by their bounds.
        return reduce(or_, ((pc.field("layer") == layer) & (pc.field("unit") == unit) for layer, unit in pairs))
    return among("layer", sorted({layer for layer, _ in pairs})) & among("unit", sorted({unit for _, unit in pairs}))


def uses_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what a neuron's page shows of its concepts, from rows of `rankings`."""
    found = [
        {"name": row["concept"], "rank": row["rank"], "n": row["n"], "negative": row["activation"] < 0}
        | {key: number(row[key]) for key in ("score", "specific")}
        for row in rows
    ]
    return sorted(found, key=lambda row: (row["rank"], -(row["score"] or 0)))[:CONCEPTS]


def _examples(run: Run, names: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    near = run.rows("examples", of_neurons(run, names) & (pc.field("rank") <= EXAMPLES))
    for row in example_rows(run, near.sort_by([("sign", "descending"), ("rank", "ascending")])):
        known = {"sign": row["sign"], "activation": number(row["activation"]), "id": row["sample_id"]}
        place = {name: row[name] for name in ("token", "image_token") if row[name]}
        found[run.names.name(row["layer"], row["unit"])].append(known | place)
    return found


def _activity(run: Run, names: Collection[str]) -> dict[str, list[tuple[str, str, str, float]]]:
    """Return for each neuron its rows of kind of label, label, modality and fraction of open tokens."""
    found: dict[str, list[tuple[str, str, str, float]]] = defaultdict(list)
    where = of_neurons(run, names) & (pc.field("module") == "language") & (pc.field("n_tokens") > 0)
    for row in run.rows("activity", where).to_pylist():
        share = round(row["n_active"] / row["n_tokens"], 3)
        name = run.names.name(row["layer"], row["unit"])
        found[name].append((row["label_kind"], row["label"], row["modality"], share))
    for rows in found.values():
        # The row over all labels comes first, so that the cut below never loses it.
        rows.sort(key=lambda row: (row[0] != "all", row[0], row[2], -row[3]))
        del rows[LABELS:]
    return found


def _maps(run: Run, names: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """Return for each neuron its own heat maps, each with its sample and the concept that the sample shows."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if "heatmaps" in run.tables:
        for row in run.rows("heatmaps", pc.field("neuron").isin(list(names))).to_pylist():
            found[row["neuron"]].append({"id": row["sample_id"], "concept": row["concept"], "map": map_of(row)})
    return found


def layer_profile(run: Run) -> list[dict[str, Any]]:
    """Return for each layer the fraction of the concepts' ten highest neurons in it, and how active it is."""
    widths = run.info["model"]["widths"]
    shares = layer_shares(run)
    used = _by_layer(run, "select layer, max(n_concepts) as most, sum(n_concepts) as total from neurons group by layer")
    opened = _by_layer(
        run,
        f"select layer, {', '.join(map(OPEN.format, ('image', 'text')))} from activity "
        "where module = 'language' and label_kind = 'all' group by layer",
    )
    return [
        {
            "layer": layer,
            "width": width,
            **{order: number(share[layer]) for order, share in shares.items()},
            "most": used[layer]["most"],
            "mean": number(float(used[layer]["total"]) / width),
            **{kind: number(opened.get(layer, {}).get(kind)) for kind in ("image", "text")},
        }
        for layer, width in enumerate(widths)
    ]


def _by_layer(run: Run, query: str) -> dict[int, dict[str, Any]]:
    return {row["layer"]: row for row in run.sql(query).to_pylist()}
