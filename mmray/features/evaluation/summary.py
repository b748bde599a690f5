"""From the rows of all samples to the measures of an evaluation, in the form that is written and printed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa

from mmray.features.evaluation.protocols import PRIMARY, is_share, protocol_of, value_of
from mmray.features.evaluation.settings import MeasureSettings
from mmray.statistics.bootstrap import Measured, by_measure, measure

NOT_AT_HAND = "the images that the edit was made on are not at hand; of others: "


def summarise(measurements: pa.Table, settings: MeasureSettings) -> dict[str, dict[str, Any]]:
    """Return measure → before, after, low, high, n and protocol; the primary ones first, the others by name.

    Where the edit's own images are not at hand, its reliability is that on the images it never saw.
    """
    sums = by_measure(measurements)
    found: dict[str, dict[str, Any]] = {}
    for name in {*PRIMARY, *sums}:
        measured = Measured(None, None, None, None, 0)
        if name in sums:
            measured = measure(*sums[name], value_of(name), settings.draws, settings.seed, share=is_share(name))
        found[name] = asdict(measured) | {"protocol": protocol_of(name, settings)}
    unseen = {name: values for name, values in found.items() if name.startswith("image_generality")}
    if not found["reliability"]["n"] and unseen["image_generality"]["n"]:
        for name, values in unseen.items():
            if not name.endswith(("_flip", "_crop")):
                own = name.replace("image_generality", "reliability")
                found[own] = values | {"protocol": NOT_AT_HAND + values["protocol"]}
    order = {name: place for place, name in enumerate(PRIMARY)}
    return {name: found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}
