"""The report's page of saliency: measures of every method, and words with their maps."""

from __future__ import annotations

from typing import Any

from mmray.report.concepts import number
from mmray.report.section import Request, Section, map_of

WORDS = 24
"""Words with maps on the page."""


def section(request: Request) -> Section:
    """Return the page's measures and words; empty lists for a run without them."""
    run = request.run
    measures, maps = run.optional("saliency"), run.optional("saliency_maps")
    words: dict[tuple[str, str], dict[str, Any]] = {}
    for row in maps.to_pylist() if maps is not None else ():
        key = row["sample_id"], row["concept"]
        # Rows of one word are spread over the methods: words that have begun still take theirs.
        if key not in words and len(words) == WORDS:
            continue
        # Of several objects with this name the page shows the first one's box.
        box = [number(value) for value in row["boxes"][0]]
        word = words.setdefault(key, {"id": row["sample_id"], "word": row["concept"], "maps": {}})
        word["maps"][row["method"]] = map_of(row) | {"box": box}
    rows = measures.to_pylist() if measures is not None else []
    page = {
        "measures": [row | {name: number(row[name]) for name in ("value", "low", "high")} for row in rows],
        "words": list(words.values()),
    }
    return Section(page, samples=[word["id"] for word in words.values()])
