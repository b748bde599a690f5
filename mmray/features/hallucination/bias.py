"""The table of bias: how answers shift when embeddings move between two prompts, with unread replies counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.data.image_keys import image_key
from mmray.features.hallucination.perturb_answers import ORIGINAL
from mmray.features.hallucination.tables import TABLES
from mmray.statistics.bootstrap import measure, totals_by_image

READ = "mean of answer after − before over images where both could be read; n: these images"
MOVES = {
    "steps": "moved along the detector's gradient, bounded in norm, where the source is seen",
    "one step": "one step along the gradient, of that norm",
    "plain steps": "along the plain gradient, of that norm",
    "unrelated": "control: moved between two unrelated prompts, of that norm",
    "random": "control: moved in a random direction, of that norm",
    "random in place": "control: moved at random, with that norm in each patch",
    "random natural": "control: moved at random with the covariance of embeddings, of that norm",
    "sign step": "as published: every entry moved by the same amount along the sign of the gradient",
    "sign step unrelated": "control: the published step between two unrelated prompts",
    "sign step random": "control: every entry moved by the published amount with a random sign",
}
"""Condition → how the embedding was moved."""

Row = dict[str, Any]


def bias_table(answers: pa.Table, pairs: Sequence[tuple[str, str]], draws: int, seed: int) -> pa.Table:
    """Return a row per pair, question and condition: the mean shift of the answers, and how many could not be read.

    `answers` has the answers before the move under the condition `original`. A reply without an answer enters no mean.
    """
    grouped: dict[tuple[str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in answers.to_pylist():
        # "random 1" and "random 2" are draws of one condition.
        grouped[row["source"], row["target"], row["question"]][row["condition"].rstrip(" 0123456789")].append(row)
    # Pairs in the order in which they were given, not by name.
    place = {pair: number for number, pair in enumerate(pairs)}
    rows: list[Row] = []
    for (source, target, question), conditions in sorted(
        grouped.items(), key=lambda item: (place.get(item[0][:2], len(place)), item[0])
    ):
        before = {row["sample_id"]: row["value"] for row in conditions[ORIGINAL]}
        for condition in (name for name in MOVES if name in conditions):
            own = conditions[condition]
            read = [row for row in own if row["value"] is not None and before[row["sample_id"]] is not None]
            rows.append(
                {"source": source, "target": target, "question": question, "condition": condition}
                | _shift(read, before, draws, seed)
                | {"protocol": f"{MOVES[condition]}; {READ}", "asked": len(own)}
                | {"unread_before": sum(value is None for value in before.values())}
                | {"unread_after": sum(row["value"] is None for row in own)}
            )
    return pa.Table.from_pylist(rows, schema=TABLES["bias"])


def _shift(read: Sequence[Row], before: dict[str, float | None], draws: int, seed: int) -> Row:
    """Return the means before and after, their difference with its interval over images, and the number of images."""
    if not read:
        return dict.fromkeys(("before", "after", "value", "low", "high")) | {"n": 0}
    old = np.array([before[row["sample_id"]] for row in read], dtype=float)
    new = np.array([row["value"] for row in read], dtype=float)
    images = [image_key(row["sample_id"], row["image"]) for row in read]
    totals = totals_by_image(images, new - old, np.ones_like(new))
    found = measure(totals, totals, draws=draws, seed=seed)
    return {"before": float(old.mean()), "after": float(new.mean()), "value": found.after} | {
        "low": found.low,
        "high": found.high,
        "n": found.n,
    }
