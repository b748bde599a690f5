"""Rows of units of work → what zeroing, steering and the logit lens show of labels, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from mmray.features.selectivity.masks import Mask
from mmray.features.selectivity.reply_language import Recogniser
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.steering import Steer
from mmray.features.selectivity.tables import TABLES
from mmray.statistics.bootstrap import measure

SHOWN_TOKENS = 10

Key = tuple[str | None, str | None]
"""Masked label and control; (None, None) without a mask."""


def intervention_rows(
    parts: Iterable[pa.Table], masks: Sequence[Mask], images: Mapping[str, str], facts: Mapping[str, str]
) -> pa.Table:
    """Return the matrix: a row a mask, label and measure, with the interval of the change over images.

    `images` tells of samples which share one.
    """
    sums: dict[tuple[str, str], dict[Key, dict[str, tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for part in parts:
        for row in part.to_pylist():
            key = (row["masked"], row["control"])
            sums[row["label"], row["measure"]][key][row["sample_id"]] = (row["total"], row["count"])
    sizes = {(mask.label, mask.control): len(mask.neurons) for mask in masks}
    rows = []
    for (label, name), by_mask in sorted(sums.items()):
        plain = by_mask[None, None]
        samples = sorted(plain)
        image = np.unique([images.get(sample, sample) for sample in samples], return_inverse=True)[1]
        before = np.array([plain[sample] for sample in samples])
        for mask in masks:
            changed = by_mask[mask.label, mask.control]
            after = np.array([changed[sample] for sample in samples])
            # The change is one number of each draw: what was added, over the same count.
            change = np.stack([after[:, 0] - before[:, 0], before[:, 1]], axis=1)
            found = measure(_summed(before, image), _summed(change, image))
            base = float(before[:, 0].sum() / before[:, 1].sum())
            rows.append(
                {
                    **facts,
                    "masked": mask.label,
                    "control": mask.control,
                    "neurons": sizes[mask.label, mask.control],
                    "label": label,
                    "measure": name,
                    "before": base,
                    "after": base + (found.after or 0.0),
                    "change": found.after,
                    "low": found.low,
                    "high": found.high,
                    "n": len(samples),
                }
            )
    return pa.Table.from_pylist(rows, schema=TABLES["interventions"])


def _summed(numbers: Float[ndarray, "sample sum"], image: Int[ndarray, " sample"]) -> Float[ndarray, "image sum"]:
    total = np.zeros((image.max() + 1, numbers.shape[1]))
    np.add.at(total, image, numbers)
    return total


def stage_rows(parts: Iterable[pa.Table], facts: Mapping[str, str]) -> pa.Table:
    """Return a row a mask, layer and kind of position."""
    sums: dict[tuple[str | None, str, int], np.ndarray] = {}
    tokens: dict[tuple[str | None, str, int], Counter[str]] = defaultdict(Counter)
    for part in parts:
        for row in part.to_pylist():
            key = (row["masked"], row["position"], row["layer"])
            numbers = np.array([row[name] for name in ("n_tokens", "entropy", "agreed", "shift")], float)
            sums[key] = sums.get(key, np.zeros(4)) + numbers
            for token, count in zip(row["tokens"], row["counts"], strict=True):
                tokens[key][token] += count
    rows = []
    for key in sorted(sums, key=lambda key: (key[0] or "", key[1:])):
        count, entropy, agreed, shift = sums[key].tolist()
        frequent = tokens[key].most_common(SHOWN_TOKENS)
        rows.append(
            {
                **facts,
                "masked": key[0],
                "position": key[1],
                "layer": key[2],
                "n_tokens": int(count),
                "entropy": entropy / count,
                "agreement": agreed / count,
                "shift": shift / count,
                "tokens": [token for token, _ in frequent],
                "shares": [number / count for _, number in frequent],
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["stages"])


def steering_rows(
    parts: Iterable[pa.Table],
    steer: Steer,
    settings: SelectivitySettings,
    known: Recogniser,
    facts: Mapping[str, str],
) -> pa.Table:
    """Return a row a caption, with the labels that it and the steered one read like."""
    where = "all positions" if steer.everywhere else "the answer's positions"
    means = "mean at that token of an answer" if settings.steer_values == "course" else "mean over answers"
    described = f"{settings.steer_neurons} neurons set to {settings.steer_factor:g} × their {means}, at {where}"
    rows = [
        {
            **facts,
            "source": steer.source,
            "target": steer.target,
            "steering": described,
            "neurons": len(steer.neurons),
            **reply,
            "label_before": known.label(reply["before"]),
            "label_after": known.label(reply["after"]),
            "words_before": known.share(reply["before"], steer.target),
            "words_after": known.share(reply["after"], steer.target),
        }
        for part in parts
        for reply in part.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["steering"])
