"""The section of a report on languages and domains: neurons, interventions, steering and stages of each analysis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mmray.features.selectivity.tables import ANALYSIS, TABLES
from mmray.report.concepts import number
from mmray.report.section import Request, Section
from mmray.runs.run import Run

FIRST = 8
"""Neurons listed per label."""
CAPTIONS = 12
"""Steered captions shown per pair of labels; a third of them are failures."""
TOKENS = 5
"""Top tokens shown per layer."""

Row = Mapping[str, Any]


def section(request: Request) -> Section:
    """Return the page's contents for each analysis of the run, in the order of its table."""
    found = {name: _by_analysis(request.run, name) for name in TABLES}
    page = [
        dict(zip((column.name for column in ANALYSIS), analysis, strict=True))
        | {
            "union": rows[0]["union"],
            "labels": _labels(rows, found["selectivity"][analysis]),
            "matrices": _matrices(found["interventions"][analysis]),
            "steering": _steering(found["steering"][analysis]),
            "stages": _stages(found["stages"][analysis]),
        }
        for analysis, rows in found["selective_labels"].items()
    ]
    return Section(page)


def _by_analysis(run: Run, name: str) -> defaultdict[tuple[str, ...], list[Row]]:
    rows: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    table = run.optional(name)
    # A run of an earlier version may lack the table.
    for row in table.to_pylist() if table is not None else ():
        rows[tuple(row[column.name] for column in ANALYSIS)].append(row)
    return rows


def _labels(rows: Sequence[Row], neurons: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row per label: its neurons, those by chance, their layers, and the first of them."""
    first: dict[str, list[str]] = defaultdict(list)
    for row in sorted(neurons, key=lambda row: row["rank"]):
        if len(first[row["label"]]) < FIRST:
            first[row["label"]].append(row["neuron"])
    return [
        {name: row[name] for name in ("label", "samples", "tokens", "neurons", "layers")}
        | {name: number(row[name]) for name in ("cut", "chance", "stability")}
        | {"first": first[row["label"]]}
        for row in rows
    ]


def _matrices(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one matrix per measure and control, with masks as rows and measured labels as columns.

    Perplexity comes first, then nll, then accuracy.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["measure"], row["control"]][row["masked"]][row["label"]] = row
    # All matrices have the measured labels in the order of the masks, so that a label's own samples are the diagonal.
    order = list(dict.fromkeys([row["masked"] for row in rows] + [row["label"] for row in rows]))
    matrices = []
    for (measure, control), masks in sorted(found.items(), key=lambda item: item[0][0], reverse=True):
        measured = [name for name in order if any(name in cells for cells in masks.values())]
        matrices.append(
            {
                "measure": measure,
                "control": control,
                "labels": measured,
                "masks": [
                    {
                        "masked": masked,
                        "neurons": next(iter(cells.values()))["neurons"],
                        "cells": [_cell(cells.get(name)) for name in measured],
                    }
                    for masked, cells in masks.items()
                ],
            }
        )
    return matrices


def _cell(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    numbers = ("before", "after", "change", "low", "high")
    return {name: number(row[name]) for name in numbers} | {"n": row["n"]}


def _steering(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, per pair of labels, how many captions read like the target, with successes and failures as examples."""
    pairs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        pairs[row["source"], row["target"]].append(row)
    shown = ("sample_id", "before", "after", "label_after")
    return [
        {
            "source": source,
            "target": target,
            "steering": found[0]["steering"],
            "neurons": found[0]["neurons"],
            "n": len(found),
            "already": sum(row["label_before"] == target for row in found),
            "turned": sum(row["label_after"] == target for row in found),
            "whole": sum(row["words_after"] == 1.0 for row in found),
            "examples": [
                {name: row[name] for name in shown} | {"words_after": number(row["words_after"])}
                for row in _examples(found, target)
            ],
        }
        for (source, target), found in pairs.items()
    ]


def _examples(rows: Sequence[Row], target: str) -> list[Row]:
    """Return captions that turned into the target, then failures, which fill a third of the list or what is left."""
    turned = [row for row in rows if row["label_after"] == target]
    failed = [row for row in rows if row["label_after"] != target]
    # With few successes, failures fill the rest of the list.
    kept = failed[: max(CAPTIONS // 3, CAPTIONS - len(turned))]
    return [*turned[: CAPTIONS - len(kept)], *kept]


def _stages(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in ("masked", "layer", "position", "n_tokens")}
        | {name: number(row[name]) for name in ("entropy", "agreement", "shift")}
        | {"tokens": row["tokens"][:TOKENS]}
        for row in rows
    ]
