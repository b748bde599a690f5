"""Collects measurements per sample: sums that add up over samples, whichever worker measured them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from mmray.features.evaluation.tables import PARTS


@dataclass
class MeasurementBuffer:
    """The tables of one unit of work.

    A measurement is a sample's part in a measure: a list of sums before the edit and one after it, most often what is
    counted and of how many. A measure's value is a function of their totals.
    """

    images: Mapping[str, str] = field(default_factory=dict)
    """The key of each sample's image. The bootstrap draws samples of one image together, and others by themselves."""
    measurements: list[dict[str, object]] = field(default_factory=list)
    captions: list[dict[str, object]] = field(default_factory=list)
    errors: list[dict[str, object]] = field(default_factory=list)

    def add(self, measure: str, sample_id: str, before: Sequence[float], after: Sequence[float]) -> None:
        """Add a sample's part in a measure; parts of the same sample and measure add up."""
        self.measurements.append(
            {"measure": measure, "sample_id": sample_id, "image": self.images.get(sample_id)}
            | {"before": list(before), "after": list(after)}
        )

    def share(self, measure: str, sample_id: str, before: float, after: float, of: float = 1.0) -> None:
        """Add counts before and after, out of `of`; nothing if `of` is 0."""
        if of:
            self.add(measure, sample_id, (before, of), (after, of))

    def kept(self, measure: str, sample_id: str, outcomes: Iterable[float]) -> None:
        """Add how far each of several things is as before the edit, from 0 to 1; before it, each is 1."""
        found = [float(outcome) for outcome in outcomes]
        self.share(measure, sample_id, len(found), sum(found), len(found))

    def extend(self, other: MeasurementBuffer) -> None:
        """Add the rows of another part of the unit."""
        self.measurements += other.measurements
        self.captions += other.captions
        self.errors += other.errors

    def tables(self) -> dict[str, pa.Table]:
        """Return the rows as tables."""
        return {name: pa.Table.from_pylist(getattr(self, name), schema=PARTS[name]) for name in PARTS}
