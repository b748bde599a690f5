"""Observations of single images, and the table of their means over images with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy import ndarray

from mmray.data.samples import Failure
from mmray.features.properties.protocols import SHARES, VALUES, protocol_of
from mmray.features.properties.tables import PARTS, TABLES
from mmray.statistics.bootstrap import Measured, measure, ratio


class Key(NamedTuple):
    """A measure of a property, for neurons chosen by a method or a control, with their number and the strength."""

    property: str
    measure: str
    method: str
    neurons: int | None = None
    strength: float | None = None


@dataclass
class Observations:
    """Collects the tables of one unit of work."""

    observations: list[dict[str, object]] = field(default_factory=list)
    heatmaps: list[dict[str, object]] = field(default_factory=list)
    errors: list[dict[str, object]] = field(default_factory=list)

    def add(self, key: Key, concept: str, sample_id: str, value: float, of: float = 1.0) -> None:
        """Add an image's numerator and denominator; those of the same image add up."""
        row = key._asdict() | {"concept": concept, "sample_id": sample_id, "value": float(value), "of": float(of)}
        self.observations.append(row)

    def extend(self, key: Key, concept: str, samples: Sequence[str], values: Iterable[float]) -> None:
        """Add one value per image."""
        for sample_id, value in zip(samples, values, strict=True):
            self.add(key, concept, sample_id, value)

    def fail(self, concept: str, problem: str) -> None:
        """Add an error for a concept that could not be measured, or only in part."""
        self._error(None, concept, "properties", problem)

    def leave_out(self, concept: str, failure: Failure) -> None:
        """Add an error for an image that a concept is measured without; it counts for the concept, like all errors."""
        self._error(failure.sample_id, concept, failure.stage, f"{failure.source}: left out: {failure.message}")

    def _error(self, sample_id: str | None, concept: str, stage: str, problem: str) -> None:
        # One line per error, as in every table of errors.
        message = " ".join(problem.split())[:500]
        self.errors.append(
            {"sample_id": sample_id, "source": concept, "shard_id": None, "stage": stage, "message": message}
        )

    def tables(self) -> dict[str, pa.Table]:
        """Return the tables of `PARTS`."""
        return {name: pa.Table.from_pylist(getattr(self, name), schema=schema) for name, schema in PARTS.items()}


def summarise(
    observations: pa.Table,
    draws: int,
    seed: int,
    images: Mapping[str, str] | None = None,
    *,
    held_out: bool = False,
) -> pa.Table:
    """Return the table `properties`: each measure over all concepts, then per concept, with intervals over images.

    `images` maps samples to keys of their images; without it, each sample is an image. `held_out`: no image ranked the
    neurons, which the protocols say. The order of rows does not change the result.
    """
    image_of = images or {}
    grouped: dict[tuple[Key, str | None], dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for row in observations.to_pylist():
        key = Key(*(row[name] for name in Key._fields))
        # Samples of one image are not independent, so they are one draw of the bootstrap.
        image = image_of.get(row["sample_id"], row["sample_id"])
        for concept in (None, row["concept"]):
            # None is the group of all concepts.
            grouped[key, concept].setdefault(image, []).append((row["value"], row["of"]))
    ordered = sorted(grouped.items(), key=lambda pair: _order(*pair[0]))
    rows = [_row(key, concept, parts, draws, seed, held_out) for (key, concept), parts in ordered]
    return pa.Table.from_pylist([row for row in rows if row["value"] is not None], schema=TABLES["properties"])


def _order(key: Key, concept: str | None) -> tuple[object, ...]:
    return concept or "", key.property, key.measure, key.method, key.neurons or 0, key.strength or 0.0


def _row(
    key: Key, concept: str | None, images: dict[str, list[tuple[float, float]]], draws: int, seed: int, held_out: bool
) -> dict[str, object]:
    # Sorted because the order of addition changes the last bits of a sum.
    sums: ndarray = np.array([np.sum(sorted(images[name]), axis=0) for name in sorted(images)])
    found: Measured = measure(sums, sums, VALUES.get(key.measure, ratio), draws, seed, share=key.measure in SHARES)
    return key._asdict() | {
        "concept": concept,
        "value": found.after,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "protocol": protocol_of(key, held_out=held_out),
    }
