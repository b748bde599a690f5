"""From outcomes per record to the paper's table, under the published definitions and under corrected ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from mmray.features.mmedit.tables import TABLES
from mmray.statistics.bootstrap import by_measure, measure, ratio

PREFIX = "mmedit_"
REWRITES = ("reliability", "text_generality", "image_generality")
LOCALITY = ("text_locality", "image_locality")
FIVE = (*REWRITES, *LOCALITY)
"""The paper's measures, in the order of its table."""
BEYOND = ("portability", "random_image_locality", "no_image_locality", "consistent_image_locality")
HARMONIC = "harmonic_mean"


@dataclass(frozen=True)
class Protocol:
    """How measures are defined: by the ends of the names that an evaluation gives them."""

    rewrites: str
    image_locality: str
    text_locality: str
    definition: str


PROTOCOLS = {
    "published": Protocol(
        "_exact",
        "_legacy",
        "_legacy_top1",
        "as MMEdit's trainer: teacher-forced, every token of the target likeliest; locality: likeliest tokens before "
        "and after, rank by rank at all positions of the sequence, of text 1 and of images 10 per position",
    ),
    "token": Protocol(
        "_token",
        "_legacy",
        "_legacy_top1",
        "as MMEdit's editor: share of the target's tokens likeliest, teacher-forced; locality as published",
    ),
    "corrected": Protocol(
        "",
        "",
        "",
        "greedy: the reply is the target, but for case and a full stop; locality: the reply is unchanged to the letter",
    ),
}
"""By name."""


def summarise(outcomes: pa.Table, draws: int, seed: int) -> pa.Table:
    """Return the table `mmedit`; its rows are in order of task, method and protocol, and intervals are over images."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in outcomes.to_pylist():
        groups[row["task"], row["method"], row["edits"]].append(row)
    rows = [
        {"task": task, "method": method, "edits": edits, **row}
        for (task, method, edits), some in groups.items()
        for row in _rows(some, draws, seed)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["mmedit"])


def _rows(outcomes: list[dict[str, Any]], draws: int, seed: int) -> Iterator[dict[str, Any]]:
    sums = by_measure(pa.Table.from_pylist(outcomes))
    for name, protocol in PROTOCOLS.items():
        # Measures beyond the paper have no published code here.
        measures = FIVE if name != "corrected" else (*FIVE, *BEYOND)
        found = {one: sums[key] for one in measures if (key := _key(one, protocol)) in sums}
        for one, (before, after) in found.items():
            yield {"protocol": name, "measure": one, "definition": protocol.definition} | _measured(
                measure(before, after, ratio, draws, seed, share=True)
            )
        five = _complete(outcomes, [_key(one, protocol) for one in FIVE])
        if five is not None:
            row = _measured(measure(five, five, harmonic, draws, seed)) | {"before": None}
            yield {"protocol": name, "measure": HARMONIC, "definition": f"of the five; {protocol.definition}"} | row


def _complete(outcomes: list[dict[str, Any]], names: list[str]) -> Float[ndarray, "image sum"] | None:
    """Return the sums of these measures side by side, of the images that have all of them; None if none has.

    The bootstrap then draws an image in all measures together.
    """
    having = [{row["image"] for row in outcomes if row["measure"] == name} for name in names]
    images = set.intersection(*having)
    if not images:
        return None
    sums = by_measure(pa.Table.from_pylist([row for row in outcomes if row["image"] in images]))
    return np.concatenate([sums[name][1] for name in names], axis=1)


def _key(name: str, protocol: Protocol) -> str:
    if not name.endswith("locality"):
        return f"{PREFIX}{name}{protocol.rewrites}"
    return f"{PREFIX}{name}{protocol.text_locality if name == 'text_locality' else protocol.image_locality}"


def _measured(found: Any) -> dict[str, Any]:
    return {"before": found.before, "value": found.after, "low": found.low, "high": found.high, "n": found.n}


def harmonic(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the harmonic mean of shares whose sums and counts stand in turn; 0 if one of them is 0."""
    shares = totals[:, 0::2] / totals[:, 1::2]
    # A share of 0 makes the sum of reciprocals infinite, and the mean 0, as it should be.
    with np.errstate(divide="ignore"):
        mean: Float[ndarray, " draw"] = shares.shape[1] / (1 / shares).sum(axis=1)
    return mean
