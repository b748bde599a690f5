"""Sums of scores per concept in one shard, and their merge over shards with a certified top-k.

With 350,000 neurons a dense table of concepts × neurons does not fit in memory. So each shard keeps, per concept, the
neurons with the highest sums, and the largest sum that it left out as a bound. The merge adds up what was kept. The sum
of a neuron that some shards left out is at most what was kept plus those shards' bounds. A rank is certified if no
bound reaches it. All sums are fp64 sums of fp32 scores in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int, Int64
from numpy import ndarray
from torch import Tensor

from mmray.features.census.tables import PARTS
from mmray.runs.tables import list_column, list_values, vector_column, vectors

ALL_KEPT = 16_384
"""Models of at most so many neurons keep all of them, and every rank is certified."""
KEPT_OF_MORE = 2_048
"""Neurons that a shard keeps per concept for larger models."""

SUMS: dict[str, type[np.float64 | np.float32]] = {
    "score": np.float64,
    "score_squares": np.float64,
    "activation": np.float32,
}
"""Columns of sums over a concept's occurrences, in order of accumulation, with their type in a committed part."""

COMPACT_AT = 4
"""Parts of a concept that are collected before they are added up, to limit memory."""


def candidates_kept(candidates: int | None, neurons: int) -> int:
    """Return how many neurons a shard keeps per concept, given `--candidates`."""
    return min(neurons, candidates or (neurons if neurons <= ALL_KEPT else KEPT_OF_MORE))


class ConceptSums:
    """Accumulates one shard's scores per concept, on the model's device."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = widths
        self.concepts: dict[str, int] = {}
        self.counts: list[int] = []
        self._sums: list[Tensor | None] = [None] * len(widths)
        self._rows = torch.zeros(0, dtype=torch.long)
        self._one_hot = torch.zeros(0, 0)

    def begin(self, concepts: Sequence[str]) -> None:
        """Begin a batch, given the concept of each of its occurrences."""
        for concept in concepts:
            index = self.concepts.setdefault(concept, len(self.concepts))
            self.counts.extend([0] * (index + 1 - len(self.counts)))
            self.counts[index] += 1
        in_batch = {concept: row for row, concept in enumerate(dict.fromkeys(concepts))}
        self._rows = torch.tensor([self.concepts[concept] for concept in in_batch], dtype=torch.long)
        self._one_hot = torch.zeros(len(in_batch), len(concepts), dtype=torch.float64)
        self._one_hot[[in_batch[concept] for concept in concepts], range(len(concepts))] = 1

    @torch.inference_mode()
    def add(
        self, layer: int, scores: Float[Tensor, "occurrence neuron"], activation: Float[Tensor, "occurrence neuron"]
    ) -> None:
        """Add one layer of the batch."""
        sums = self._sums[layer]
        if sums is None or sums.shape[1] < len(self.concepts):
            # Doubled, so that growing costs a constant amount per concept.
            room = max(64, 2 * len(self.concepts))
            grown = torch.zeros(len(SUMS), room, self.widths[layer], dtype=torch.float64, device=scores.device)
            if sums is not None:
                grown[:, : sums.shape[1]] = sums
            self._sums[layer] = sums = grown
        wide = scores.double()
        # A product with a 0/1 matrix adds in a fixed order; atomic additions on a GPU would not. Rows are distinct, so
        # index_add_ adds once to each.
        one_hot, rows = self._one_hot.to(scores.device), self._rows.to(scores.device)
        for total, values in zip(sums, (wide, wide.square(), activation.double()), strict=True):
            total.index_add_(0, rows, one_hot @ values)

    def tables(self, kept: int) -> tuple[pa.Table, pa.Table]:
        """Return the shard's `concepts`, with the `kept` highest neurons of each, and its `totals`."""
        neurons = sum(self.widths)
        names = sorted(self.concepts)
        order = torch.tensor([self.concepts[name] for name in names], dtype=torch.long)
        counts = np.array([self.counts[row] for row in order], np.int64)
        scores = self._summed("score", order)
        # Infinite where nothing is left out: no sum reaches the bound or falls below the floor.
        bounds, floors = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        schema = PARTS["concepts"]
        index, highest = pa.nulls(len(names), schema.field("neuron").type), None
        if kept < neurons:
            # Stable, so that ties go to the lower neuron on every device.
            ordered = scores.sort(dim=1, descending=True, stable=True)
            bounds, floors = ordered.values[:, kept].numpy(), ordered.values[:, -1].numpy()
            highest = ordered.indices[:, :kept].sort(dim=1).values
            index = list_column(highest.numpy(), schema.field("neuron").type)
        columns = []
        for name in SUMS:
            # For a single occurrence the sum of squares is the square of the sum, so it is not written. Many concepts
            # of a shard occur once.
            present = counts > (name == "score_squares")
            rows = torch.from_numpy(present)
            sums = scores if name == "score" else self._summed(name, order[rows])
            if highest is not None:
                sums = sums.gather(1, highest[rows])
            columns.append(vector_column(sums.numpy(), present))
        concepts = pa.Table.from_arrays(
            [pa.array(names, pa.string()), pa.array(counts), pa.array(bounds), pa.array(floors), index, *columns],
            schema=schema,
        )
        schema = PARTS["totals"]
        totals = [list_column(self._total(name)[None], schema.field(name).type) for name in schema.names[1:]]
        return concepts, pa.Table.from_arrays([pa.array([counts.sum()]), *totals], schema=schema)

    def _total(self, name: str) -> Float64[ndarray, " neuron"]:
        """Return one of SUMS, added up over all concepts, for the neurons of all layers."""
        index = list(SUMS).index(name)
        parts = [
            np.zeros(width) if sums is None else sums[index].sum(dim=0, dtype=torch.float64).cpu().numpy()
            for sums, width in zip(self._sums, self.widths, strict=True)
        ]
        return np.concatenate(parts)

    def _summed(self, name: str, concepts: Int[Tensor, " concept"]) -> Float[Tensor, "concept neuron"]:
        """Return one of SUMS for these concepts and the neurons of all layers, on the CPU."""
        whole = torch.from_numpy(np.zeros((len(concepts), sum(self.widths)), SUMS[name]))
        for sums, part in zip(self._sums, torch.split(whole, list(self.widths), dim=1), strict=True):
            if sums is not None:
                part.copy_(sums[list(SUMS).index(name)].index_select(0, concepts.to(sums.device)))
        return whole


@dataclass
class MergedConcept:
    """One concept over all shards so far; arrays run over the neurons that any shard kept."""

    n: int = 0
    shards: int = 0
    bound: float = 0.0
    floor: float = 0.0
    parts: list[ndarray] = field(default_factory=list)

    def compact(self) -> Float64[ndarray, "7 neuron"]:
        """Add up the collected parts.

        Rows are neuron, score, squares, activation, and the sums of n, bound and floor over the shards that kept it.
        """
        if len(self.parts) > 1:
            # Shards that keep all neurons have the same ones, which needs no sorting.
            if all(np.array_equal(part[0], self.parts[0][0]) for part in self.parts[1:]):
                self.parts = [np.vstack([self.parts[0][0], sum(part[1:] for part in self.parts)])]
                return self.parts[0]
            joined = np.concatenate(self.parts, axis=1)
            neurons, inverse = np.unique(joined[0], return_inverse=True)
            sums = [np.bincount(inverse, weights=row, minlength=len(neurons)) for row in joined[1:]]
            self.parts = [np.stack([neurons, *sums])]
        return self.parts[0]


class ConceptMerge:
    """Adds up the `concepts` and `totals` of shards; the result does not depend on how the data was cut."""

    def __init__(self, neurons: int) -> None:
        self.neurons = neurons
        self.concepts: dict[str, MergedConcept] = {}
        self.total = np.zeros(neurons)
        self.total_squares = np.zeros(neurons)
        self.n = 0
        self.shards = 0

    def add(self, concepts: pa.Table, totals: pa.Table) -> None:
        """Add one shard."""
        # Totals cover all neurons, kept or not: `specific` and `selective` need what they do elsewhere.
        self.total += list_values(totals["score"])[0]
        self.total_squares += list_values(totals["score_squares"])[0]
        self.n += totals["n"][0].as_py()
        self.shards += 1
        all_neurons = np.arange(self.neurons)
        index = [all_neurons] * len(concepts) if concepts["neuron"].null_count else list_values(concepts["neuron"])
        sums = (vectors(concepts[name], dtype) for name, dtype in SUMS.items())
        scalars = (concepts[name].to_pylist() for name in ("concept", "n", "bound", "floor"))
        for concept, n, bound, floor, neuron, score, squares, activation in zip(*scalars, index, *sums, strict=True):
            merged = self.concepts.setdefault(concept, MergedConcept())
            merged.n += n
            merged.shards += 1
            merged.bound += bound
            merged.floor += floor
            # What this shard says of its neurons; subtracted later, it leaves the shards that did not keep one.
            kept = [np.full(len(neuron), float(value)) for value in (n, bound, floor)]
            # The sum of squares is not written for a single occurrence; see ConceptSums.tables.
            merged.parts.append(np.stack([neuron, score, score**2 if n == 1 else squares, activation, *kept]))
            if len(merged.parts) >= COMPACT_AT:
                merged.compact()

    def sums(self, concept: str) -> ConceptScores:
        """Return the sums of the concept's neurons that any shard kept, with their bounds."""
        merged = self.concepts[concept]
        neuron, score, squares, activation, n, kept_bound, kept_floor = merged.compact()
        missing = n < merged.n
        rounding = self.rounding(merged.n, merged.shards)
        # A shard that kept all neurons has infinite bounds, and inf - inf is NaN; but nothing is missing there.
        with np.errstate(invalid="ignore"):
            upper = np.where(missing, score + merged.bound - kept_bound + rounding, score)
            lower = np.where(missing, score + merged.floor - kept_floor - rounding, score)
        return ConceptScores(
            n=merged.n,
            neuron=neuron.astype(np.int64),
            # What a shard left out may be negative, so the sum so far can exceed the largest possible total.
            score=np.clip(score, lower, upper),
            squares=squares,
            activation=activation,
            lower=lower,
            upper=upper,
            exact=~missing,
            left_out=merged.bound + rounding if len(neuron) < self.neurons else -np.inf,
            rounding=rounding,
        )

    def rounding(self, n: int, shards: int) -> float:
        """Return the largest rounding error of a sum of n scores that is added up per shard.

        The standard bound, additions · eps · Σ |score|, with the Cauchy-Schwarz inequality for the last factor. It also
        holds for sums of shards' bounds, each of which may come from a different neuron.
        """
        largest = np.max(self.total_squares, initial=0.0)
        return float(4 * np.finfo(np.float64).eps * (n + shards) * np.sqrt(n * shards * largest))


@dataclass(frozen=True)
class ConceptScores:
    """Sums over a concept's n occurrences; all arrays run over the same neurons, in order of their index."""

    n: int
    neuron: Int64[ndarray, " neuron"]
    score: Float64[ndarray, " neuron"]
    """The sum; if it is not exact, the sum over the shards that kept the neuron, clipped to `lower` and `upper`."""
    squares: Float64[ndarray, " neuron"]
    activation: Float64[ndarray, " neuron"]
    lower: Float64[ndarray, " neuron"]
    """Lower bound of the sum."""
    upper: Float64[ndarray, " neuron"]
    """Upper bound of the sum."""
    exact: ndarray
    """Whether every shard with the concept kept the neuron, so that its sum is known."""
    left_out: float
    """Upper bound of the sum of a neuron outside this list."""
    rounding: float
    """Largest rounding error of a sum; bounds that are not exact include it."""

    def certified(self) -> ndarray:
        """Return for each neuron whether its rank by sum is certain; see `certify`."""
        return self.certify(self.lower - self.rounding, self.upper + self.rounding, self.left_out)

    def certify(
        self, least: Float64[ndarray, " neuron"], most: Float64[ndarray, " neuron"], left_out: float
    ) -> ndarray:
        """Return for each neuron whether its rank is certain, given bounds of the values that are ranked.

        A neuron's value lies between `least` and `most`; outside the list it is at most `left_out`. A rank is certain
        if every other neuron is certainly above or certainly below. Exact neurons are ordered by their values, up to
        rounding.
        """
        partial = _overlapping(least, most, ~self.exact)
        exact = _overlapping(least, most, self.exact)
        # A neuron that is not exact overlaps itself.
        alone = np.where(self.exact, partial == 0, partial + exact == 1)
        return np.asarray(alone & (least > left_out))


def _overlapping(
    least: Float64[ndarray, " neuron"], most: Float64[ndarray, " neuron"], of: ndarray
) -> Int64[ndarray, " neuron"]:
    """Return for each interval how many of the intervals selected by `of` it overlaps."""
    below = np.searchsorted(np.sort(most[of]), least, side="left")
    not_above = np.searchsorted(np.sort(least[of]), most, side="right")
    return np.asarray(not_above - below)
