"""How well confidences judge claims: ranking (AUROC) and calibration (ECE, reliability), with intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from mmray.data.image_keys import image_key
from mmray.statistics.bootstrap import Value, measure, ratio, totals_by_image

BINS = 10
"""Bins of confidence, of equal width."""
MAX_RANKS = 1024
"""Distinct scores that an AUROC tells apart; more are merged by rank, to bound the histograms."""
SURE = 0.5
"""A judge confirms a claim from this confidence on."""
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
    "mean_present": "mean confidence where the object is there",
    "mean_absent": "mean confidence where it is not",
    "true": "of the claims, those that are true",
    "unparsable": "of the answers, those with neither yes nor no; they are in no other figure",
}


def judged(claims: pa.Table, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the measures of every group of claims by every judge, as rows of the table `opinions`."""
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
        group: str,
        name: str,
        judge: str | None,
        members: Sequence[dict[str, Any]],
        totals: Float[ndarray, "image sum"],
        value: Value = ratio,
        *,
        edge: float | None = None,
        confidence: float | None = None,
        count: int | None = None,
    ) -> None:
        # An ECE is no share of outcomes: at 0 it must not get the interval of one.
        found = measure(totals, totals, value, draws, seed, share=value is not _ece)
        protocol = f"{GROUPS[group]}: {PROTOCOLS[name]}" + (f"; {JUDGES[judge]}" if judge else "")
        rows.append(
            {"claims": group, "measure": name, "judge": judge, "value": found.after, "low": found.low}
            | {
                "high": found.high,
                "n": len(members) if count is None else count,
                "protocol": protocol,
                "bin": edge,
                "confidence": confidence,
            }
        )

    if answers:
        # Counted over all answers, before the groups below leave these out.
        unparsed = np.array([row["claimed"] is None for row in answers], dtype=float)
        add(
            "question", "unparsable", None, answers, totals_by_image(_images(answers), unparsed, np.ones_like(unparsed))
        )
    for group, members in groups.items():
        if not members:
            continue
        images = _images(members)
        truth = np.array([row["present"] for row in members], dtype=float)
        ones = np.ones_like(truth)
        add(group, "true", None, members, totals_by_image(images, truth, ones))
        for judge in JUDGES:
            scores = _confidence(members, judge)
            # Histograms of scores, because they add up over the images that a bootstrap draws; AUROCs do not.
            add(group, "auroc", judge, members, histograms(images, scores, truth), auroc)
            # A score of exactly 1 belongs to the last bin.
            bins = np.minimum((scores * BINS).astype(int), BINS - 1)
            in_bin = np.eye(BINS)[bins]
            binned = np.stack([in_bin * sums[:, None] for sums in (ones, scores, truth)], axis=2)
            add(group, "ece", judge, members, totals_by_image(images, *binned.reshape(len(scores), -1).T), _ece)
            sure = (scores >= SURE).astype(float)
            for name, own in (("confirmed_true", truth), ("confirmed_false", 1 - truth)):
                add(group, name, judge, members, totals_by_image(images, sure * own, own))
            for name, own in (("mean_present", truth), ("mean_absent", 1 - truth)):
                totals = totals_by_image(images, scores * own, own)
                add(group, name, judge, members, totals, count=int(own.sum()))
            # Empty bins have no row, because a share of nothing has no value.
            for number in sorted(set(bins.tolist())):
                own = in_bin[:, number]
                totals = totals_by_image(images, truth * own, own)
                mean = float((scores * own).sum() / own.sum())
                add(group, "reliability", judge, members, totals, edge=number / BINS, confidence=mean)
    return rows


def _images(claims: Sequence[dict[str, Any]]) -> list[str]:
    return [image_key(row["sample_id"], row["image"]) for row in claims]


def _confidence(claims: Sequence[dict[str, Any]], judge: str) -> Float[ndarray, " claim"]:
    if judge == "detector":
        return np.array([row["confidence"] for row in claims])
    # The product of a noun's token probabilities, or p(yes) among yes and no.
    probability: Float[ndarray, " claim"] = np.exp(np.array([row["log_prob"] for row in claims]))
    return probability


def histograms(
    images: Sequence[str], scores: Float[ndarray, " claim"], truth: Float[ndarray, " claim"]
) -> Float[ndarray, "image sum"]:
    """Return how many of an image's claims have each distinct score: first of the false ones, then of the true ones."""
    _, rank = np.unique(scores, return_inverse=True)
    if (count := int(np.max(rank)) + 1) > MAX_RANKS:
        # Neighbours in rank share a bin, which keeps the order of all others.
        rank, count = rank * MAX_RANKS // count, MAX_RANKS
    names, index = np.unique(np.array(images), return_inverse=True)
    total = np.zeros((len(names), 2 * count))
    # Added in place: a histogram per claim, as `totals_by_image` would need, does not fit in memory for large data.
    np.add.at(total, (index, rank + count * truth.astype(int)), 1.0)
    return total


def auroc(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return how often a true claim scores higher than a false one; ties count half."""
    false, true = np.split(totals, 2, axis=1)
    below = np.cumsum(false, axis=1) - false / 2  # false claims below each score, half of those that tie
    return ratio(np.stack([(true * below).sum(axis=1), true.sum(axis=1) * false.sum(axis=1)], axis=1))


def _ece(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the mean gap between confidence and truth, weighted by the claims of each bin."""
    by_bin = totals.reshape(len(totals), BINS, 3)
    gap = np.abs(by_bin[:, :, 1] - by_bin[:, :, 2]).sum(axis=1)
    return ratio(np.stack([gap, by_bin[:, :, 0].sum(axis=1)], axis=1))
