"""From measurements per sample to the measures of an evaluation, as they are written and printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from mmray.features.editing.bounds import verdict
from mmray.features.evaluation.measures import PRIMARY, measure_of, protocol_of
from mmray.features.evaluation.settings import MeasureSettings
from mmray.statistics.bootstrap import Measured, by_measure, measure

UNSEEN_INSTEAD = "the images that the edit was made on are not at hand; of others: "


IN_SAMPLE = "in-sample, the neurons were ranked on the same data; "


def summarise(
    measurements: pa.Table, settings: MeasureSettings, *, in_sample: bool = False
) -> dict[str, dict[str, Any]]:
    """Return measure → before, after, low, high, n and protocol; the primary ones first, the others by name.

    `in_sample`: the data is the run's own, which the protocols of success on other images then say. If the edit's own
    images are not available, its reliability is that on images it never saw.
    """
    sums = by_measure(measurements)
    found: dict[str, dict[str, Any]] = {}
    for name in {*PRIMARY, *sums}:
        kind, measured = measure_of(name), Measured(None, None, None, None, 0)
        if name in sums:
            measured = measure(*sums[name], kind.value, settings.draws, settings.seed, share=kind.unit == "share")
        found[name] = asdict(measured) | {"protocol": protocol_of(name, settings)}
    unseen = {name: values for name, values in found.items() if name.startswith("image_generality")}
    if in_sample:
        for values in unseen.values():
            values["protocol"] = IN_SAMPLE + values["protocol"]
    # Where the run's data is gone, the images that the edit was made on can't be measured.
    if not found["reliability"]["n"] and unseen["image_generality"]["n"]:
        for name, values in unseen.items():
            # Own images are never flipped or cropped.
            if not name.endswith(("_flip", "_crop")):
                own = name.replace("image_generality", "reliability")
                found[own] = values | {"protocol": UNSEEN_INSTEAD + values["protocol"]}
    order = {name: place for place, name in enumerate(PRIMARY)}
    return {name: found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}


def verdict_of(measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what these measures say of the edit."""
    return verdict({name: row["after"] for name, row in measures.items()})
