"""The second opinion of a report: what a detector says of the model's claims, and pictures of those that are wrong."""

from __future__ import annotations

import base64

from mmray.report.concepts import number
from mmray.report.section import Request, Section

PICTURES = 24
"""Pictures of mistakes that are shown."""
NUMBERS = ("value", "low", "high", "bin", "confidence")


def section(request: Request) -> Section:
    """Return the measures and the mistakes that the page shows; empty lists where there are none yet."""
    run = request.run
    measures, mistakes = run.optional("opinions"), run.optional("mistakes")
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
