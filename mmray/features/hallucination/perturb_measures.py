"""From answers under every condition to what changed, compared with the original's, with intervals over images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.data.image_keys import image_key
from mmray.features.hallucination.perturb_answers import ORIGINAL
from mmray.statistics.bootstrap import measure

RIGHT = {"source": 1.0, "target": 0.0, "unrelated": 0.0}
"""What is answered before, of things that are there or are not, where it is right."""
PROTOCOLS = {
    "changed": "answers other than before the move, of those that could be read both times",
    "followed": "of answers that were right before: source yes → no, target no → yes",
    "shift": "mean of answer after − before, of those that could be read both times",
    "unparsable": "replies in which no answer could be found, of all",
    "relative_norm": "L2 norm of the move, in parts of the embedding's",
}

SHARES = ("changed", "followed", "unparsable")
"""Measures between 0 and 1."""


def changes(answers: pa.Table, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the measures of every condition: over all questions, and by what they are about."""
    rows: list[dict[str, Any]] = []
    by_condition: dict[str, list[dict[str, Any]]] = defaultdict(list)
    before: dict[tuple[str, str], float | None] = {}
    for row in answers.to_pylist():
        # Draws of one kind are one condition.
        by_condition[row["condition"].rstrip(" 0123456789")].append(row)
        if row["condition"] == ORIGINAL:
            before[row["sample_id"], row["question"]] = row["value"]

    def add(condition: str, about: str | None, name: str, sums: Sequence[tuple[str, float]]) -> None:
        if not sums:
            return
        by_image: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for image, value in sums:
            by_image[image][0] += value
            by_image[image][1] += 1
        totals = np.array([by_image[image] for image in sorted(by_image)])
        found = measure(totals, totals, draws=draws, seed=seed, share=name in SHARES)
        rows.append(
            {
                "condition": condition,
                "about": about,
                "measure": name,
                "value": found.after,
                "low": found.low,
                "high": found.high,
                "n": len(sums),
                "protocol": PROTOCOLS[name],
            }
        )

    for condition, members in by_condition.items():
        abouts = list(dict.fromkeys(row["about"] for row in members))
        for about in [None, *abouts] if len(abouts) > 1 else abouts:
            own = [row for row in members if about is None or row["about"] == about]
            add(condition, about, "unparsable", [(_image(row), float(row["value"] is None)) for row in own])
            add(condition, about, "relative_norm", [(_image(row), row["relative_norm"]) for row in own])
            if condition == ORIGINAL:
                continue
            pairs = [(row, before[row["sample_id"], row["question"]]) for row in own]
            read = [(row, old) for row, old in pairs if old is not None and row["value"] is not None]
            add(condition, about, "changed", [(_image(row), float(row["value"] != old)) for row, old in read])
            add(condition, about, "shift", [(_image(row), row["value"] - old) for row, old in read])
            moved = [
                (_image(row), float(row["value"] is not None and row["value"] != old))
                for row, old in pairs
                if row["about"] in ("source", "target") and old == RIGHT[row["about"]]
            ]
            add(condition, about, "followed", moved)
    return rows


def _image(row: Mapping[str, Any]) -> str:
    return image_key(row["sample_id"], row["image"])
