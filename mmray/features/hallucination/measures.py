"""How good an opinion on claims is: ranking (AUROC), calibration (ECE, reliability), with intervals over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from mmray.data.image_keys import image_key
from mmray.statistics.bootstrap import Value, measure, ratio

BINS = 10
"""Bins of confidence, of equal width."""
MOST_RANKS = 1024
"""Different scores that are told apart; more are put together by rank."""
JUDGES = {
    "detector": "the detector's confidence, the highest probability of any box",
    "language model": "the language model's own probability of what it says",
}
GROUPS = {
    "caption": "nouns of generated captions",
    "question": "yes/no questions, present and absent objects",
    "yes": "questions answered yes",
    "no": "questions answered no",
}
PROTOCOLS = {
    "auroc": "ranks what is there above what is not; 0.5 is chance",
    "ece": f"expected calibration error over {BINS} bins of equal width",
    "reliability": "of the bin's claims, those that are true; `confidence` is their mean confidence",
    "confirmed_true": "of the claims that are true, those with a confidence of 0.5 or more",
    "confirmed_false": "of the claims that are false, those with a confidence of 0.5 or more",
    "true": "of the claims, those that are true",
    "unparsable": "of the answers, those with neither yes nor no; they are in no other figure",
}


def judged(claims: pa.Table, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the measures of every group of claims by every judge."""
    rows: list[dict[str, Any]] = []
    every = claims.to_pylist()
    answers = [row for row in every if row["kind"] != "caption"]
    groups = {
        "caption": [row for row in every if row["kind"] == "caption"],
        "question": [row for row in answers if row["claimed"] is not None],
        "yes": [row for row in answers if row["claimed"] is True],
        "no": [row for row in answers if row["claimed"] is False],
    }

    def add(
        claims: str,
        name: str,
        judge: str | None,
        images: Sequence[str],
        totals: Any,
        value: Value = ratio,
        **more: Any,
    ) -> None:
        found = measure(totals, totals, value, draws, seed, share=value is not _ece)
        rows.append(
            {
                "claims": claims,
                "measure": name,
                "judge": judge,
                "value": found.after,
                "low": found.low,
                "high": found.high,
                "n": len(images),
                "protocol": f"{GROUPS[claims]}: {PROTOCOLS[name]}" + (f"; {JUDGES[judge]}" if judge else ""),
                "bin": None,
                "confidence": None,
            }
            | more
        )

    if answers:
        lacking = np.array([[row["claimed"] is None, 1.0] for row in answers])
        images = [image_key(row["sample_id"], row["image"]) for row in answers]
        add("question", "unparsable", None, images, _by_image(images, lacking))
    for group, members in groups.items():
        if not members:
            continue
        images = [image_key(row["sample_id"], row["image"]) for row in members]
        truth = np.array([row["present"] for row in members], dtype=float)
        add(group, "true", None, images, _by_image(images, np.stack([truth, np.ones_like(truth)], axis=1)))
        for judge in JUDGES:
            sure = _confidence(members, judge)
            add(group, "auroc", judge, images, _histograms(images, sure, truth), _auroc)
            bins = _bins(sure, truth)
            add(group, "ece", judge, images, _by_image(images, bins.reshape(len(sure), -1)), _ece)
            above = (sure >= 0.5).astype(float)
            for name, own in (("confirmed_true", truth), ("confirmed_false", 1 - truth)):
                add(group, name, judge, images, _by_image(images, np.stack([above * own, own], axis=1)))
            for number, sums in _filled(bins):
                mean = float(sums[:, 1].sum() / sums[:, 0].sum())
                edge = number / BINS
                true = _by_image(images, sums[:, [2, 0]])
                add(group, "reliability", judge, images, true, bin=edge, confidence=mean)
    return rows


def _confidence(members: Sequence[dict[str, Any]], judge: str) -> Float[ndarray, " claim"]:
    if judge == "detector":
        return np.array([row["confidence"] for row in members])
    probability: Float[ndarray, " claim"] = np.exp(np.array([row["log_prob"] for row in members]))
    return probability


def _by_image(images: Sequence[str], sums: Float[ndarray, "claim sum"]) -> Float[ndarray, "image sum"]:
    """Add up the claims of each image: they are drawn together."""
    names, index = np.unique(np.array(images), return_inverse=True)
    total = np.zeros((len(names), sums.shape[1]))
    np.add.at(total, index, sums)
    return total


def _histograms(
    images: Sequence[str], scores: Float[ndarray, " claim"], truth: Float[ndarray, " claim"]
) -> Float[ndarray, "image sum"]:
    """Return how many of an image's claims have each of the different scores, first of false and then of true ones."""
    _, rank = np.unique(scores, return_inverse=True)
    if (count := int(rank.max()) + 1) > MOST_RANKS:
        rank, count = rank * MOST_RANKS // count, MOST_RANKS
    names, index = np.unique(np.array(images), return_inverse=True)
    total = np.zeros((len(names), 2 * count))
    # A row a claim, as long as the histogram, would not fit for large data.
    np.add.at(total, (index, rank + count * truth.astype(int)), 1.0)
    return total


def _auroc(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return how often a true claim has a higher score than a false one; ties are half."""
    false, true = np.split(totals, 2, axis=1)
    below = np.cumsum(false, axis=1) - false / 2
    return ratio(np.stack([(true * below).sum(axis=1), true.sum(axis=1) * false.sum(axis=1)], axis=1))


def _bins(scores: Float[ndarray, " claim"], truth: Float[ndarray, " claim"]) -> Float[ndarray, "claim bin sum"]:
    """Return of each claim, in its bin: one, its confidence, and whether it is true."""
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    sums = np.stack([np.ones_like(scores), scores, truth], axis=1)[:, None, :]
    placed: Float[ndarray, "claim bin sum"] = np.eye(BINS)[place][:, :, None] * sums
    return placed


def _filled(bins: Float[ndarray, "claim bin sum"]) -> Iterator[tuple[int, Float[ndarray, "claim sum"]]]:
    for number in range(BINS):
        if bins[:, number, 0].any():
            yield number, bins[:, number]


def _ece(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the mean distance between confidence and truth, weighted by the claims of each bin."""
    by_bin = totals.reshape(len(totals), BINS, 3)
    apart = np.abs(by_bin[:, :, 1] - by_bin[:, :, 2]).sum(axis=1)
    return ratio(np.stack([apart, by_bin[:, :, 0].sum(axis=1)], axis=1))
