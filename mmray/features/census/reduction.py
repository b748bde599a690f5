"""One shard's occurrences → sums by concept, and their merge over shards: the certified top-k.

A dense table of concepts × neurons does not fit at 350,000 neurons, so each shard keeps, of every concept, the neurons
with the highest sums and the largest sum that it left out. The merge adds what was kept; a neuron that some shard left
out has at most what was kept plus those shards' largest left-out sums. A rank is certified when no bound reaches it.
Everything here is a sum in fp64 of fp32 scores, taken in a fixed order.
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
"""Up to so many neurons, every one is kept and every rank is certified."""
KEPT_OF_MORE = 2_048
"""Neurons a concept that a shard keeps of larger models."""

SUMS: dict[str, type[np.float64 | np.float32]] = {
    "score": np.float64,
    "score_squares": np.float64,
    "activation": np.float32,
}
"""Columns of sums over a concept's occurrences, in the order in which they are accumulated, as they are kept."""

COMPACT_AT = 4
"""A concept's collected parts are added up whenever so many have come, to hold memory down."""


def candidates_kept(asked: int | None, neurons: int) -> int:
    """Return how many neurons a shard keeps for each concept."""
    return min(neurons, asked or (neurons if neurons <= ALL_KEPT else KEPT_OF_MORE))


class ConceptSums:
    """Accumulates one shard's scores by concept, on the model's device."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = widths
        self.concepts: dict[str, int] = {}
        self.counts: list[int] = []
        self._sums: list[Tensor | None] = [None] * len(widths)
        self._rows = torch.zeros(0, dtype=torch.long)
        self._one_hot = torch.zeros(0, 0)

    def begin(self, concepts: Sequence[str]) -> None:
        """Announce the concepts of a batch's occurrences."""
        for concept in concepts:
            index = self.concepts.setdefault(concept, len(self.concepts))
            self.counts.extend([0] * (index + 1 - len(self.counts)))
            self.counts[index] += 1
        places = {concept: place for place, concept in enumerate(dict.fromkeys(concepts))}
        self._rows = torch.tensor([self.concepts[concept] for concept in places], dtype=torch.long)
        self._one_hot = torch.zeros(len(places), len(concepts), dtype=torch.float64)
        self._one_hot[[places[concept] for concept in concepts], range(len(concepts))] = 1

    @torch.inference_mode()
    def add(
        self, layer: int, scores: Float[Tensor, "occurrence neuron"], activation: Float[Tensor, "occurrence neuron"]
    ) -> None:
        """Add one layer of the announced batch."""
        sums = self._sums[layer]
        if sums is None or sums.shape[1] < len(self.concepts):
            room = max(64, 2 * len(self.concepts))
            grown = torch.zeros(len(SUMS), room, self.widths[layer], dtype=torch.float64, device=scores.device)
            if sums is not None:
                grown[:, : sums.shape[1]] = sums
            self._sums[layer] = sums = grown
        wide = scores.double()
        # A product with a fixed 0/1 matrix adds in a fixed order; scattered atomic additions on a GPU would not.
        one_hot, rows = self._one_hot.to(scores.device), self._rows.to(scores.device)
        for kind, numbers in zip(sums, (wide, wide.square(), activation.double()), strict=True):
            kind.index_add_(0, rows, one_hot @ numbers)

    def tables(self, kept: int) -> tuple[pa.Table, pa.Table]:
        """Return the shard's `concepts`, with the `kept` highest neurons of each, and its `totals`."""
        neurons = sum(self.widths)
        names = sorted(self.concepts)
        order = torch.tensor([self.concepts[name] for name in names], dtype=torch.long)
        counts = np.array([self.counts[place] for place in order], np.int64)
        scores = self._summed("score", order)
        bounds, floors = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        schema = PARTS["concepts"]
        index, best = pa.nulls(len(names), schema.field("neuron").type), None
        if kept < neurons:
            highest = scores.sort(dim=1, descending=True, stable=True)
            bounds, floors = highest.values[:, kept].numpy(), highest.values[:, -1].numpy()
            best = highest.indices[:, :kept].sort(dim=1).values
            index = list_column(best.numpy(), schema.field("neuron").type)
        columns = []
        for name in SUMS:
            # Of one occurrence the sum of squares is the square of the sum: many concepts need not be written twice.
            present = counts > (name == "score_squares")
            rows = torch.from_numpy(present)
            sums = scores if name == "score" else self._summed(name, order[rows])
            if best is not None:
                sums = sums.gather(1, best[rows])
            columns.append(vector_column(sums.numpy(), present))
        concepts = pa.Table.from_arrays(
            [pa.array(names, pa.string()), pa.array(counts), pa.array(bounds), pa.array(floors), index, *columns],
            schema=schema,
        )
        every = PARTS["totals"]
        totals = [list_column(self._total(name)[None], every.field(name).type) for name in every.names[1:]]
        return concepts, pa.Table.from_arrays([pa.array([counts.sum()]), *totals], schema=every)

    def _total(self, name: str) -> Float64[ndarray, " neuron"]:
        """Return one of SUMS over all concepts and layers."""
        place = list(SUMS).index(name)
        parts = [
            np.zeros(width) if sums is None else sums[place].sum(dim=0, dtype=torch.float64).cpu().numpy()
            for sums, width in zip(self._sums, self.widths, strict=True)
        ]
        return np.concatenate(parts)

    def _summed(self, name: str, concepts: Int[Tensor, " concept"]) -> Float[Tensor, "concept neuron"]:
        """Return one of SUMS of these concepts over all layers, on the CPU."""
        whole = torch.from_numpy(np.zeros((len(concepts), sum(self.widths)), SUMS[name]))
        for sums, part in zip(self._sums, torch.split(whole, list(self.widths), dim=1), strict=True):
            if sums is not None:
                part.copy_(sums[list(SUMS).index(name)].index_select(0, concepts.to(sums.device)))
        return whole


@dataclass
class Merged:
    """One concept over all shards so far; arrays run over the neurons that any shard kept."""

    n: int = 0
    shards: int = 0
    bound: float = 0.0
    floor: float = 0.0
    parts: list[ndarray] = field(default_factory=list)

    def compact(self) -> Float64[ndarray, "7 neuron"]:
        """Add up the collected parts: neuron, score, squares, activation, and n, bound, floor of the shards kept in."""
        if len(self.parts) > 1:
            if all(np.array_equal(part[0], self.parts[0][0]) for part in self.parts[1:]):
                self.parts = [np.vstack([self.parts[0][0], sum(part[1:] for part in self.parts)])]
                return self.parts[0]
            joined = np.concatenate(self.parts, axis=1)
            neurons, inverse = np.unique(joined[0], return_inverse=True)
            sums = [np.bincount(inverse, weights=row, minlength=len(neurons)) for row in joined[1:]]
            self.parts = [np.stack([neurons, *sums])]
        return self.parts[0]


class ConceptMerge:
    """Adds up the `concepts` and `totals` of shards; the result does not depend on how data was cut."""

    def __init__(self, neurons: int) -> None:
        self.neurons = neurons
        self.concepts: dict[str, Merged] = {}
        self.total = np.zeros(neurons)
        self.total_squares = np.zeros(neurons)
        self.n = 0
        self.shards = 0

    def add(self, concepts: pa.Table, totals: pa.Table) -> None:
        """Take in one shard."""
        self.total += list_values(totals["score"])[0]
        self.total_squares += list_values(totals["score_squares"])[0]
        self.n += totals["n"][0].as_py()
        self.shards += 1
        every = np.arange(self.neurons)
        index = [every] * len(concepts) if concepts["neuron"].null_count else list_values(concepts["neuron"])
        sums = (vectors(concepts[name], dtype) for name, dtype in SUMS.items())
        facts = (concepts[name].to_pylist() for name in ("concept", "n", "bound", "floor"))
        for concept, n, bound, floor, neuron, score, squares, activation in zip(*facts, index, *sums, strict=True):
            merged = self.concepts.setdefault(concept, Merged())
            merged.n += n
            merged.shards += 1
            merged.bound += bound
            merged.floor += floor
            kept = [np.full(len(neuron), float(number)) for number in (n, bound, floor)]
            merged.parts.append(np.stack([neuron, score, score**2 if n == 1 else squares, activation, *kept]))
            if len(merged.parts) >= COMPACT_AT:
                merged.compact()

    def sums(self, concept: str) -> ConceptScores:
        """Return the concept's neurons that any shard kept, with what is known of each."""
        merged = self.concepts[concept]
        neuron, score, squares, activation, n, kept_bound, kept_floor = merged.compact()
        missing = n < merged.n
        rounding = self.rounding(merged.n, merged.shards)
        # A shard that kept all has infinite bounds, and inf - inf is not a number; nothing is missing there.
        with np.errstate(invalid="ignore"):
            upper = np.where(missing, score + merged.bound - kept_bound + rounding, score)
            lower = np.where(missing, score + merged.floor - kept_floor - rounding, score)
        return ConceptScores(
            n=merged.n,
            neuron=neuron.astype(np.int64),
            # What a shard left out may be below zero: the sum so far can be more than the whole can come to.
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
        """Return the most that a sum of n scores, added up by shard, can be off by its rounding.

        The standard bound, additions · eps · Σ |score|, with Cauchy's for the last factor; the bounds of shards, which
        may be of another neuron each, are held by it as well.
        """
        largest = self.total_squares.max(initial=0.0)
        return float(4 * np.finfo(np.float64).eps * (n + shards) * np.sqrt(n * shards * largest))


@dataclass(frozen=True)
class ConceptScores:
    """Sums over a concept's n occurrences; arrays run over the same neurons, in order of their index."""

    n: int
    neuron: Int64[ndarray, " neuron"]
    score: Float64[ndarray, " neuron"]
    """The sum, or where it is not known the sum in the shards that kept the neuron, within `lower` and `upper`."""
    squares: Float64[ndarray, " neuron"]
    activation: Float64[ndarray, " neuron"]
    lower: Float64[ndarray, " neuron"]
    """The least that the neuron's sum can be."""
    upper: Float64[ndarray, " neuron"]
    """The most that the neuron's sum can be."""
    exact: ndarray
    """Every shard with the concept kept the neuron, so that its sum is known."""
    left_out: float
    """The most that the sum of a neuron outside this list can be."""
    rounding: float
    """The most that a sum can be off by its rounding; `upper` and `left_out` have it in them where it matters."""

    def certified(self) -> ndarray:
        """Return for each neuron whether its place in the order of sums is known, as `certify`."""
        return self.certify(self.lower - self.rounding, self.upper + self.rounding, self.left_out)

    def certify(
        self, least: Float64[ndarray, " neuron"], most: Float64[ndarray, " neuron"], left_out: float
    ) -> ndarray:
        """Return for each neuron whether its place in an order is known, though numbers are known in part.

        Its number there is between `least` and `most`, and that of a neuron outside the list at most `left_out`. The
        place is known where each other neuron is above or below it for certain; two exact ones are told apart as they
        are, to the rounding.
        """
        partial = _overlapping(least, most, ~self.exact)
        exact = _overlapping(least, most, self.exact)
        # A neuron known in part overlaps itself.
        alone = np.where(self.exact, partial == 0, partial + exact == 1)
        return np.asarray(alone & (least > left_out))


def _overlapping(
    least: Float64[ndarray, " neuron"], most: Float64[ndarray, " neuron"], of: ndarray
) -> Int64[ndarray, " neuron"]:
    """Return for each interval how many of the intervals `of` it overlaps."""
    below = np.searchsorted(np.sort(most[of]), least, side="left")
    not_above = np.searchsorted(np.sort(least[of]), most, side="right")
    return np.asarray(not_above - below)
