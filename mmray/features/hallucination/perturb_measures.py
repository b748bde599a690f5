"""From answers under every condition to measures of change, compared with the original's answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.data.image_keys import image_key
from mmray.features.hallucination.perturb_answers import ORIGINAL
from mmray.statistics.bootstrap import measure, totals_by_image

CORRECT = {"source": 1.0, "target": 0.0}
"""The correct answer before a move: the source is there, the target is not."""
PROTOCOLS = {
    "changed": "answers other than before the move, of those that could be read both times",
    "followed": "of answers that were right before: source yes → no, target no → yes",
    "shift": "mean of answer after − before, of those that could be read both times",
    "unparsable": "replies in which no answer could be found, of all",
    "relative_norm": "L2 norm of the move, as a fraction of the embedding's",
}
SHARES = ("changed", "followed", "unparsable")
"""Measures between 0 and 1."""


def changes(answers: pa.Table, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the measures of every condition, over all questions and by what they are about."""
    rows: list[dict[str, Any]] = []
    by_condition: dict[str, list[dict[str, Any]]] = defaultdict(list)
    original: dict[tuple[str, str], float | None] = {}
    for row in answers.to_pylist():
        # "random 1" and "random 2" are draws of one condition.
        by_condition[row["condition"].rstrip(" 0123456789")].append(row)
        if row["condition"] == ORIGINAL:
            original[row["sample_id"], row["question"]] = row["value"]

    def add(condition: str, about: str | None, name: str, values: Sequence[tuple[Mapping[str, Any], float]]) -> None:
        if not values:
            return
        images = [image_key(row["sample_id"], row["image"]) for row, _ in values]
        numbers = np.array([value for _, value in values], dtype=float)
        totals = totals_by_image(images, numbers, np.ones_like(numbers))
        found = measure(totals, totals, draws=draws, seed=seed, share=name in SHARES)
        rows.append(
            {"condition": condition, "about": about, "measure": name, "value": found.after, "low": found.low}
            | {"high": found.high, "n": len(values), "protocol": PROTOCOLS[name]}
        )

    for condition, members in by_condition.items():
        abouts = list(dict.fromkeys(row["about"] for row in members))
        # With a single kind of question, the row over all of them would repeat it.
        for about in [None, *abouts] if len(abouts) > 1 else abouts:
            own = [row for row in members if about is None or row["about"] == about]
            add(condition, about, "unparsable", [(row, float(row["value"] is None)) for row in own])
            add(condition, about, "relative_norm", [(row, row["relative_norm"]) for row in own])
            if condition == ORIGINAL:
                continue  # nothing to compare it with
            pairs = [(row, original[row["sample_id"], row["question"]]) for row in own]
            read = [(row, old) for row, old in pairs if old is not None and row["value"] is not None]
            add(condition, about, "changed", [(row, float(row["value"] != old)) for row, old in read])
            add(condition, about, "shift", [(row, row["value"] - old) for row, old in read])
            # An unreadable reply counts as not following: leaving it out would flatter moves that break the model.
            correct = [row for row, old in pairs if row["about"] in CORRECT and old == CORRECT[row["about"]]]
            followed = [(row, float(row["value"] not in (None, CORRECT[row["about"]]))) for row in correct]
            add(condition, about, "followed", followed)
    return rows
