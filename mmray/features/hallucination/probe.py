"""A sparse probe of which mentions are hallucinated, and the judges that it is compared with on test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from mmray.features.hallucination.measures import auroc, histograms
from mmray.features.hallucination.mentions import FIT, TEST
from mmray.statistics.bootstrap import Value, measure, ratio
from mmray.statistics.logistic import Logistic, fit_path

PENALTIES = tuple(np.geomspace(0.7, 0.04, 10))
"""Fractions of the least penalty at which the probe uses no neuron."""
ALMOST_NONE = (0.3, 0.05, 0.001)
"""Penalties of judges with a few columns, which need none; the last one counts."""
PARTS = 5
"""Parts of the fit images for cross-validation."""
FALSE_ALARMS = 0.02
"""Share of the true mentions that a judge may call hallucinated, for the share of hallucinated ones that it catches."""
SHUFFLES = 10
"""Probes fitted to shuffled classes."""
FACTS = {
    "log-probability": ("log_prob",),
    "length": ("length",),
    "position": ("position",),
    "all three": ("log_prob", "length", "position"),
}
"""Judges by columns of the mentions; each is a logistic regression on the fit images."""
BASELINE = "all three"
NEURONS, BOTH, RANDOM, DETECTOR, SHUFFLED = (
    "neurons",
    f"neurons with {BASELINE}",
    "random neurons",
    "detector",
    "shuffled classes",
)
PROTOCOLS = {
    NEURONS: "L1 logistic probe of the neurons' shares; neurons, penalty and weights from the fit images",
    BOTH: "logistic regression of the probe's score and the three facts",
    RANDOM: "the same probe of as many random candidates of the same layers",
    DETECTOR: "the detector's confidence that the object is there",
    SHUFFLED: f"the same probe, fitted {SHUFFLES} times to shuffled classes: mean, lowest and highest",
}


@dataclass(frozen=True)
class Mentions:
    """Mentions with the columns that judges read."""

    images: list[str]
    hallucinated: Bool[ndarray, " mention"]
    fit: Bool[ndarray, " mention"]
    """Whether it is on a fit image; the others are tested."""
    facts: Mapping[str, Float[ndarray, " mention"]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Mentions:
        """Return the mentions of rows of the part `mentions`."""
        facts = {
            name: np.array([row[name] for row in rows], dtype=float) for name in ("log_prob", "length", "position")
        }
        if rows and all(row["confidence"] is not None for row in rows):
            facts["confidence"] = np.array([row["confidence"] for row in rows], dtype=float)
        return cls(
            [row["image"] for row in rows],
            np.array([row["hallucinated"] for row in rows], dtype=bool),
            np.array([row["fold"] == FIT for row in rows], dtype=bool),
            facts,
        )

    def missing(self) -> str | None:
        """Return what the mentions lack for a probe; None: nothing."""
        for name, fold in ((FIT, self.fit), (TEST, ~self.fit)):
            for kind, members in (("hallucinated", self.hallucinated), ("true", ~self.hallucinated)):
                if (count := int((fold & members).sum())) < PARTS:
                    return f"{count} {kind} mentions on {name} images, and at least {PARTS} are needed"
        return None


@dataclass(frozen=True)
class SparseProbe:
    """A fitted probe."""

    model: Logistic
    penalty: float
    """The chosen one of PENALTIES."""
    held_out: Float[ndarray, " fit_mention"]
    """Score of each fit mention by a probe that was fitted without its image."""

    @property
    def columns(self) -> Int[ndarray, " chosen"]:
        """The columns that it uses."""
        return np.flatnonzero(self.model.weights)


def fit_probe(
    values: Float[ndarray, "mention column"],
    hallucinated: Bool[ndarray, " mention"],
    images: Sequence[str],
    most: int,
    penalty: float | None = None,
) -> SparseProbe:
    """Fit a probe of at most `most` columns, by default with the penalty of the highest cross-validated AUROC.

    Parts of the cross-validation have different images.
    """
    tried = [one for one in PENALTIES if penalty is None or one >= penalty]
    part = _parts(images)
    held_out = np.zeros((len(tried), len(values)))
    for number in range(PARTS):
        own = part == number
        # With few images a part may be empty, or the others be of one class. Its mentions then keep the score 0.
        if not own.any() or len(np.unique(hallucinated[~own])) < 2:
            continue
        for row, model in enumerate(fit_path(values[~own], hallucinated[~own], tried)):
            # Without the intercept, which differs between parts: only ranks count.
            held_out[row, own] = model.scores(values[own]) - model.intercept
    models = list(fit_path(values, hallucinated, tried))
    # Where every penalty uses no column or too many, the strongest counts: some probe has to be measured.
    allowed = [row for row, model in enumerate(models) if 0 < (model.weights != 0).sum() <= most] or [0]
    found = [rank_auroc(held_out[row], hallucinated) for row in allowed]
    best = allowed[-1] if penalty is not None else allowed[int(np.argmax(found))]
    return SparseProbe(models[best], tried[best], held_out[best])


def judge_all(
    mentions: Mentions,
    shares: Float[ndarray, "mention candidate"],
    controls: Float[ndarray, "mention candidate"],
    most: int,
    draws: int,
    seed: int,
) -> tuple[SparseProbe, Float[ndarray, " mention"], list[dict[str, Any]]]:
    """Fit the probe and all judges on the fit images.

    Returns the probe, its score of every mention, and the rows of the table `hallucination_probe` over the test images.
    """
    fit, truth = mentions.fit, mentions.hallucinated
    images = [image for image, own in zip(mentions.images, fit, strict=True) if own]
    probe = fit_probe(shares[fit], truth[fit], images, most)
    random = fit_probe(controls[fit], truth[fit], images, most)
    scores: dict[str, Float[ndarray, " mention"]] = {NEURONS: probe.model.scores(shares)}
    judges = dict(FACTS) | ({DETECTOR: ("confidence",)} if "confidence" in mentions.facts else {})
    for name, columns in judges.items():
        values = np.stack([mentions.facts[column] for column in columns], axis=1)
        scores[name] = _few(values[fit], truth[fit]).scores(values)
    # On fit images the scores of probes that have not seen them: the probe's own would count for too much.
    own = scores[NEURONS].copy()
    own[fit] = probe.held_out + probe.model.intercept
    values = np.stack([own, *(mentions.facts[column] for column in FACTS[BASELINE])], axis=1)
    scores[BOTH] = _few(values[fit], truth[fit]).scores(values)
    scores[RANDOM] = random.model.scores(controls)
    used = {NEURONS: len(probe.columns), BOTH: len(probe.columns), RANDOM: len(random.columns)}
    rows = _rows(mentions, scores, used, draws, seed)
    # The floor: what the same search finds where there is nothing to find.
    rows.append(_shuffled(mentions, shares, images, most, probe, seed))
    return probe, scores[NEURONS], rows


def rank_auroc(scores: Float[ndarray, " mention"], truth: Bool[ndarray, " mention"]) -> float:
    """Return how often a hallucinated mention scores higher than a true one; ties count half."""
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[rank]
    positive = int(truth.sum())
    # Mann-Whitney: a class's rank sum minus the least that it can be, as a fraction of the pairs.
    pairs = positive * (len(truth) - positive)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / pairs) if pairs else float("nan")


def _few(values: Float[ndarray, "mention column"], truth: Bool[ndarray, " mention"]) -> Logistic:
    return list(fit_path(values, truth, ALMOST_NONE))[-1]


def _parts(images: Sequence[str]) -> Int[ndarray, " mention"]:
    """Return the part of each mention; images in order of their keys take turns."""
    _, index = np.unique(np.array(images), return_inverse=True)
    found: Int[ndarray, " mention"] = index % PARTS
    return found


def _rows(
    mentions: Mentions,
    scores: Mapping[str, Float[ndarray, " mention"]],
    used: Mapping[str, int],
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    test = ~mentions.fit
    images = [image for image, own in zip(mentions.images, test, strict=True) if own]
    truth = mentions.hallucinated[test].astype(float)
    counts = {name: histograms(images, values[test], truth) for name, values in scores.items()}
    rows = []

    def add(judge: str, name: str, totals: Float[ndarray, "image sum"], value: Value, protocol: str) -> None:
        found = measure(totals, totals, value, draws, seed)
        rows.append(
            {"judge": judge, "measure": name, "neurons": used.get(judge), "value": found.after, "low": found.low}
            | {"high": found.high, "n": len(truth), "protocol": protocol}
        )

    for judge, own in counts.items():
        protocol = PROTOCOLS.get(judge) or f"logistic regression of {', '.join(FACTS[judge])}"
        add(judge, "auroc", own, auroc, f"{protocol}; hallucinated mentions of test images above true ones")
        alarms = f"hallucinated mentions that score above all but {FALSE_ALARMS:.0%} of the true ones"
        add(judge, "caught", own, caught, f"{protocol}; {alarms}")
    for better, judge in ((NEURONS, BASELINE), (BOTH, BASELINE), (NEURONS, RANDOM)):
        first, second = counts[better], counts[judge]
        protocol = f"AUROC of {better} minus that of {judge}, paired over test images"
        both = np.concatenate([first, second], axis=1)
        add(f"{better} above {judge}", "gain", both, partial(_gain, first.shape[1]), protocol)
    return rows


def caught(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the share of hallucinated mentions above the score that at most FALSE_ALARMS of the true ones reach.

    `totals` are histograms as of `mmray.features.hallucination.measures.histograms`, true mentions first.
    """
    # Mentions at or above each score.
    true, hallucinated = (np.cumsum(part[:, ::-1], axis=1) for part in np.split(totals, 2, axis=1))
    allowed = true <= FALSE_ALARMS * true[:, -1:]
    return ratio(np.stack([(hallucinated * allowed).max(axis=1), hallucinated[:, -1]], axis=1))


def _gain(split: int, totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    found: Float[ndarray, " draw"] = auroc(totals[:, :split]) - auroc(totals[:, split:])
    return found


def _shuffled(
    mentions: Mentions,
    shares: Float[ndarray, "mention candidate"],
    images: Sequence[str],
    most: int,
    probe: SparseProbe,
    seed: int,
) -> dict[str, Any]:
    """Return the row of probes that are fitted to shuffled classes, with the penalty of the real one."""
    fit, generator = mentions.fit, np.random.default_rng(seed)
    found = []
    for _ in range(SHUFFLES):
        truth = generator.permutation(mentions.hallucinated[fit])
        *_, model = fit_path(shares[fit], truth, [one for one in PENALTIES if one >= probe.penalty])
        found.append(rank_auroc(model.scores(shares[~fit]), mentions.hallucinated[~fit]))
    return {
        "judge": SHUFFLED,
        "measure": "auroc",
        "neurons": None,
        "value": float(np.mean(found)),
        "low": min(found),
        "high": max(found),
        "n": int((~fit).sum()),
        "protocol": PROTOCOLS[SHUFFLED],
    }
