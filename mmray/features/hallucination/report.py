"""The report's page of second opinions, and of the neurons that predict which mentions are hallucinated."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from mmray.report.concepts import number
from mmray.report.section import Request, Section
from mmray.runs.run import Run

PICTURES = 24
"""Pictures of mistakes on the page."""
NUMBERS = ("value", "low", "high", "bin", "confidence")
SHOWN, TOKENS, CAPTIONS = 60, 6, 6
"""Neurons on the page by weight, the tokens that each promotes, and captions of each kind."""
MEASURED = ("value", "low", "high")
SHIFTED = ("before", "after", *MEASURED)


def section(request: Request) -> Section:
    """Return the page's measures and mistakes; empty lists for a run without them."""
    measures, mistakes = (request.run.optional(name) for name in ("opinions", "mistakes"))
    page = {
        "measures": [
            row | {name: number(row[name]) for name in NUMBERS} for row in (measures.to_pylist() if measures else ())
        ],
        "mistakes": [
            {name: row[name] for name in ("kind", "word", "text", "mistaken_for")}
            | {"confidence": number(row["confidence"]), "probability": number(row["log_prob"])}
            | {"picture": f"data:image/png;base64,{base64.b64encode(row['picture']).decode()}"}
            for row in (mistakes.to_pylist()[:PICTURES] if mistakes else ())
        ],
    }
    bias = request.run.optional("bias")
    shifts = [row | {name: number(row[name]) for name in SHIFTED} for row in (bias.to_pylist() if bias else ())]
    return Section(page | {"bias": shifts, "neurons": _neurons(request.run)})


def _neurons(run: Run) -> dict[str, Any]:
    """Return what `--neurons` found; empty lists for a run without it."""
    names = ("hallucination_probe", "hallucination_neurons", "hallucination_mentions", "hallucination_doses")
    probe, neurons, mentions, doses = (run.optional(name) for name in names)
    found = neurons.to_pylist() if neurons else []
    layers = []
    for layer in range(len(run.info["model"]["widths"]) if found else 0):
        raised = [row["weight"] > 0 for row in found if row["layer"] == layer]
        layers.append({"layer": layer, "raised": sum(raised), "lowered": len(raised) - sum(raised)})
    strongest = sorted(found, key=lambda row: -abs(row["weight"]))[:SHOWN]
    return {
        "count": len(found),
        "probe": [_measured(row) for row in (probe.to_pylist() if probe else ())],
        "layers": layers,
        "rows": [
            {name: row[name] for name in ("layer", "neuron")}
            | {name: number(row[name]) for name in ("weight", "effect", "held_out_effect", "low", "high")}
            | {"tokens": tokens}
            for row, tokens in zip(strongest, _promoted(run, strongest), strict=True)
        ],
        "captions": _captions(mentions.to_pylist() if mentions else []),
        "doses": [_measured(row) | {"dose": number(row["dose"])} for row in (doses.to_pylist() if doses else ())],
    }


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(row) | {name: number(row[name]) for name in MEASURED}


def _promoted(run: Run, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the tokens that each neuron promotes most; none where the run has not decoded it."""
    if not rows:
        return []
    pairs = ", ".join(f"({row['layer']}, {row['unit']})" for row in rows)
    known = run.sql(f"select layer, unit, tokens from neurons where (layer, unit) in ({pairs})").to_pylist()
    tokens = {(row["layer"], row["unit"]): (row["tokens"] or [])[:TOKENS] for row in known}
    return [tokens.get((row["layer"], row["unit"]), []) for row in rows]


def _captions(mentions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return test mentions: hallucinated ones that the probe is surest of and misses, and true ones likewise."""
    tested = sorted((row for row in mentions if row["fold"] == "test"), key=lambda row: -row["score"])
    chosen = []
    for hallucinated in (True, False):
        own = [row for row in tested if row["hallucinated"] == hallucinated]
        half = CAPTIONS // 2
        chosen += own[:half] + own[max(half, len(own) - half) :]
    return [
        {name: row[name] for name in ("word", "hallucinated", "text")}
        | {"score": number(row["score"]), "probability": number(row["log_prob"])}
        for row in chosen
    ]
