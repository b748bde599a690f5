"""Observations of saliency maps, summarised as measures with intervals over images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from mmray.features.saliency.max_box import LENGTH, LEVELS, OVERLAP
from mmray.features.saliency.measures import STEPS
from mmray.features.saliency.tables import TABLES
from mmray.statistics.bootstrap import measure, ratio

WORDS = "words of captions, teacher-forced;"
ERASED = (
    f"area under the probability of the word over {STEPS} even steps, patches from the highest to the lowest; a patch "
    "is taken away by putting the mean of the image's patches in its place, in what image tokens are made of"
)
PROTOCOLS = {
    "pointing_game": f"{WORDS} the map's highest point (the middle of a plateau) lies in a box of the word's object; "
    "chance: the part of the image that the boxes take",
    "iou": f"{WORDS} IoU of the map above its 95th percentile with the boxes",
    "max_box_accuracy": f"{WORDS} MaxBoxAcc of Choe et al. 2020, as released: at {LENGTH} pixels, the box around the "
    f"largest contour above a threshold has an IoU of {OVERLAP:g} with the object's; the best of {LEVELS} thresholds "
    "for all images",
    "deletion": f"lower is better: patches are taken away, {ERASED} (Petsiuk et al. 2018)",
    "insertion": f"higher is better: patches are put back, {ERASED} (Petsiuk et al. 2018)",
}
"""Measure → how it is measured."""
ORDER = tuple(PROTOCOLS)


def best_threshold(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the highest share over the thresholds, chosen anew in every draw."""
    shares: Float[ndarray, " draw"] = totals[:, :-1].max(axis=1) / np.maximum(totals[:, -1], 1)
    return shares


def summarise_saliency(
    observations: pa.Table,
    draws: int = 1000,
    seed: int = 0,
    images: Mapping[str, str] | None = None,
    min_objects: int = 2,
) -> pa.Table:
    """Return the table `saliency`: each measure of each method, whatever the order of the observations.

    `images`: sample → key of its image; without it, each sample is an image. `min_objects`: different objects that each
    image has, for the protocol.
    """
    known = images or {}
    grouped: dict[tuple[str, str], dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for row in observations.to_pylist():
        grouped[row["measure"], row["method"]][known.get(row["sample_id"], row["sample_id"])].append(row["sums"])
    rows = []
    for (name, method), parts in sorted(grouped.items(), key=lambda pair: (ORDER.index(pair[0][0]), pair[0][1])):
        # Sorted, because the order of addition changes the last bits of a sum.
        sums: ndarray = np.array([np.sum(sorted(parts[image]), axis=0) for image in sorted(parts)])
        # No baseline: both sides of the comparison are the same sums.
        found = measure(sums, sums, best_threshold if name == "max_box_accuracy" else ratio, draws, seed, share=True)
        words = int(sums[:, -1].sum())
        protocol = f"images with at least {min_objects} different objects; {PROTOCOLS[name]}"
        rows.append(
            {"measure": name, "method": method, "value": found.after, "low": found.low, "high": found.high}
            | {"words": words, "n": found.n, "protocol": protocol}
        )
    return pa.Table.from_pylist(rows, schema=TABLES["saliency"])
