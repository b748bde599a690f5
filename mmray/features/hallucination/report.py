"""The report's page of second opinions: measures of the judges, and pictures of wrong claims."""

from __future__ import annotations

import base64

from mmray.report.concepts import number
from mmray.report.section import Request, Section

PICTURES = 24
"""Pictures of mistakes on the page."""
NUMBERS = ("value", "low", "high", "bin", "confidence")


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
    return Section(page)
