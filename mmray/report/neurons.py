"""Neurons in the report: what they write, their concepts, extreme samples and activity; and the profile of layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.neuron_names import neuron_name
from mmray.report.concepts import Concept, number
from mmray.runs.run import Run

EXAMPLES = 5
"""Samples with the highest activations per neuron, and with the lowest."""
CONCEPTS = 15
"""Concepts on a neuron's page."""
LABELS = 40
"""Rows of activity on a page; data with more labels shows those where the neuron is most active."""


def neuron_pages(run: Run, concepts: Mapping[str, Concept]) -> dict[str, dict[str, Any]]:
    """Return the page of each neuron that any concept's page lists."""
    listed = {row["neuron"] for concept in concepts.values() for row in concept.neurons}
    uses = _uses(concepts)
    examples = _examples(run, listed)
    activity = _activity(run, listed)
    pages = {}
    for row in run.table("neurons").to_pylist():
        name = row["neuron"]
        if name in listed:
            numbers = {key: number(row[key]) for key in ("mean", "std", "min", "max")}
            pages[name] = numbers | {
                "neuron": name,
                "layer": row["layer"],
                "tokens": row["tokens"],
                "suppressed": row["suppressed"],
                "open": number(row["n_active"] / max(row["n_tokens"], 1)),
                "n_tokens": row["n_tokens"],
                "n_concepts": row["n_concepts"],
                "concepts": uses[name],
                "examples": examples[name],
                "activity": activity[name],
            }
    return pages


def _uses(concepts: Mapping[str, Concept]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for concept in concepts.values():
        for row in concept.neurons:
            numbers = {key: number(row[key]) for key in ("score", "specific")}
            known = {"name": concept.name, "rank": row["rank"], "n": concept.n, "negative": row["activation"] < 0}
            found[row["neuron"]].append(known | numbers)
    return {
        name: sorted(rows, key=lambda row: (row["rank"], -(row["score"] or 0)))[:CONCEPTS]
        for name, rows in found.items()
    }


def _examples(run: Run, listed: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    table = run.table("examples")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    near = table.filter(pc.less_equal(table["rank"], EXAMPLES))
    for row in near.sort_by([("sign", "descending"), ("rank", "ascending")]).to_pylist():
        name = neuron_name(row["layer"], row["unit"])
        if name in listed:
            known = {"activation": number(row["activation"]), "id": row["sample_id"]}
            found[name].append({"sign": row["sign"], **known})
    return found


def _activity(run: Run, listed: Collection[str]) -> dict[str, list[tuple[str, str, str, float]]]:
    """Return for each neuron its rows of kind of label, label, modality and fraction of open tokens."""
    table = run.table("activity")
    table = table.filter(pc.and_(pc.equal(table["module"], "language"), pc.greater(table["n_tokens"], 0)))
    found: dict[str, list[tuple[str, str, str, float]]] = defaultdict(list)
    for row in table.to_pylist():
        name = neuron_name(row["layer"], row["unit"])
        if name in listed:
            share = round(row["n_active"] / row["n_tokens"], 3)
            found[name].append((row["label_kind"], row["label"], row["modality"], share))
    for rows in found.values():
        # The row over all labels comes first, so that the cut below never loses it.
        rows.sort(key=lambda row: (row[0] != "all", row[0], row[2], -row[3]))
        del rows[LABELS:]
    return found


def layer_profile(run: Run, concepts: Mapping[str, Concept]) -> list[dict[str, Any]]:
    """Return for each layer the fraction of the concepts' ten highest neurons in it, and how active it is."""
    widths = run.info["model"]["widths"]
    counts = np.zeros((2, len(widths)))
    for concept in concepts.values():
        by_specific = sorted(concept.neurons, key=lambda row: row["specific_rank"])[:10]
        for kind, rows in enumerate((concept.highest, by_specific)):
            for row in rows:
                counts[kind, row["layer"]] += 1
    # Fractions, because data decides how many concepts there are.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    table = run.table("neurons").group_by("layer").aggregate([("n_concepts", "sum"), ("n_concepts", "max")])
    found = {row["layer"]: row for row in table.to_pylist()}
    active = _open_by_layer(run)
    return [
        {
            "layer": layer,
            "width": width,
            "score": number(shares[0, layer]),
            "specific": number(shares[1, layer]),
            "most": found[layer]["n_concepts_max"],
            "mean": number(found[layer]["n_concepts_sum"] / width),
            "image": number(active.get((layer, "image"))),
            "text": number(active.get((layer, "text"))),
        }
        for layer, width in enumerate(widths)
    ]


def _open_by_layer(run: Run) -> dict[tuple[int, str], float]:
    table = run.table("activity")
    overall = pc.and_(pc.equal(table["module"], "language"), pc.equal(table["label_kind"], "all"))
    sums: pa.Table = (
        table.filter(overall).group_by(["layer", "modality"]).aggregate([("n_active", "sum"), ("n_tokens", "sum")])
    )
    return {
        (row["layer"], row["modality"]): row["n_active_sum"] / row["n_tokens_sum"]
        for row in sums.to_pylist()
        if row["n_tokens_sum"]
    }
