"""The section of a report on languages and domains: neurons, interventions, steering and stages of each analysis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmray.features.selectivity.settings import TOGETHER
from mmray.features.selectivity.tables import ANALYSIS, TABLES
from mmray.models.options import TEXT_BRANCH
from mmray.report.concepts import number
from mmray.report.section import Request, Section
from mmray.runs.run import Run

FIRST = 8
"""Neurons listed per label."""
CAPTIONS = 12
"""Steered captions shown per pair of labels; a third of them are failures."""
TOKENS = 5
"""Top tokens shown per layer."""
REPLIES = 8
"""Changed replies shown."""

Row = Mapping[str, Any]


def section(request: Request) -> Section:
    """Return the page's contents for each analysis of the run, in the order of its table."""
    found = {name: _by_analysis(request.run, name) for name in TABLES}
    names = [column.name for column in ANALYSIS]
    page = []
    for analysis in dict.fromkeys(
        key for name in ("selective_labels", "interventions", "stages") for key in found[name]
    ):
        named: dict[str, Any] = dict(zip(names, analysis, strict=True))
        rows = found["selective_labels"].get(analysis, [])
        page.append(
            {
                **named,
                "union": rows[0]["union"] if rows else None,
                "labels": _labels(rows, found["selectivity"][analysis]),
                "matrices": _matrices(found["interventions"][analysis]),
                "steering": _steering(found["steering"][analysis]),
                "stages": _stages(found["stages"][analysis]),
                "together": _together(named, found) if named["module"] == TOGETHER else None,
            }
        )
    # Modules together come before each of them.
    return Section(sorted(page, key=lambda row: row["module"] != TOGETHER))


def _together(named: Mapping[str, str], found: Mapping[str, Mapping[tuple[str, ...], list[Row]]]) -> dict[str, Any]:
    """Return the paper's tables: each label's neurons by module, and its own samples with them zeroed."""
    # Module and counted tokens of each analysis that this one consists of.
    parts = [("language", named["modality"]), ("vision", "image"), ("projector", "image"), (TEXT_BRANCH, "text")]
    own = [tuple({**named, "module": module, "modality": modality}.values()) for module, modality in parts]
    summaries = [row for analysis in own for row in found["selective_labels"].get(analysis, [])]
    tests = [row for analysis in own for row in found["interventions"].get(analysis, [])]
    tests += found["interventions"].get(tuple(named.values()), [])
    replies = found["masked_answers"].get(tuple(named.values()), [])
    return {
        "labels": list(dict.fromkeys(row["label"] for row in summaries)),
        "modules": list(dict.fromkeys(row["module"] for row in summaries)),
        "counts": [
            {name: row[name] for name in ("module", "label", "neurons")} | {"chance": number(row["chance"])}
            for row in summaries
        ],
        "effects": [
            _cell(row)
            | {name: row[name] for name in ("module", "control", "label", "measure", "neurons")}
            | {"protocol": row["protocol"]}
            for row in tests
            if row["masked"] == row["label"]
        ],
        "replies": _changed_replies(replies),
    }


def _changed_replies(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the first questions of each label whose reply changes with the label's neurons of all modules zeroed."""
    plain = {(row["sample_id"], row["question"]): row for row in rows if row["masked"] is None}
    by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        before = plain.get((row["sample_id"], row["question"]))
        if (
            row["control"] == "selected"
            and row["masked"] == row["label"]
            and before
            and before["reply"] != row["reply"]
        ):
            scores = {"before_score": number(before["score"]), "after_score": number(row["score"])}
            named = {name: row[name] for name in ("label", "question")}
            by_label[row["label"]].append(named | {"before": before["reply"], "after": row["reply"]} | scores)
    each = max(1, REPLIES // max(1, len(by_label)))
    return [row for found in by_label.values() for row in found[:each]]


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
                "protocols": _protocols(masks.values()),
                "masks": [
                    {
                        "masked": masked,
                        "neurons": next(iter(cells.values()))["neurons"],
                        "cells": [_cell(cells[name]) if name in cells else None for name in measured],
                    }
                    for masked, cells in masks.items()
                ],
            }
        )
    return matrices


def _protocols(masks: Iterable[Mapping[str, Row]]) -> dict[str, list[str]]:
    """Return protocol → the labels whose samples are measured by it; none in runs of earlier versions."""
    found: dict[str, list[str]] = defaultdict(list)
    for label, row in {label: row for cells in masks for label, row in cells.items()}.items():
        if row["protocol"]:
            found[row["protocol"]].append(label)
    return found


def _cell(row: Row) -> dict[str, Any]:
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
        | {"control": row.get("control")}
        | {name: number(row[name]) for name in ("entropy", "agreement", "shift")}
        | {"tokens": row["tokens"][:TOKENS]}
        for row in rows
    ]
