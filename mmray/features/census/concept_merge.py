"""Sums of scores per concept over all shards, added up from what each shard kept, with bounds on what it left out.

Shards are added one by one, and each concept's rows are then added up in the order of shards. The sum of a neuron that
some shards left out is at most what was kept plus those shards' bounds. A rank is certified if no bound reaches it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64
from numpy import ndarray

from mmray.features.census.spill import ScratchFile, Spill
from mmray.features.census.tables import PARTS, SUMS
from mmray.runs.tables import list_values, vectors

Bounds = Callable[[Int64[ndarray, " some"]], tuple[Float64[ndarray, " some"], Float64[ndarray, " some"]]]
"""Returns between which bounds the values of some neurons lie, given their rows."""


SCREENED = 64
"""Of so many neurons one is looked at first, to see which ranks are not certain."""


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

    def certified(self, rows: Int64[ndarray, " row"]) -> ndarray:
        """Return for each of these rows whether its rank by sum is certain; see `certify`."""

        def bounds(some: Int64[ndarray, " some"]) -> tuple[Float64[ndarray, " some"], Float64[ndarray, " some"]]:
            return self.lower.take(some) - self.rounding, self.upper.take(some) + self.rounding

        return self.certify(rows, bounds, self.left_out)

    def certify(self, rows: Int64[ndarray, " row"], bounds: Bounds, left_out: float, divisor: int = 1) -> ndarray:
        """Return for each of these rows whether its rank is certain, given bounds of the values that are ranked.

        A neuron's value is at most the upper bound of its sum, divided by `divisor`; outside the list it is at most
        `left_out`. A rank is certain if every other neuron is certainly above or certainly below. Exact neurons are
        ordered by their values, up to rounding.
        """
        least, most = bounds(rows)
        certain = least > left_out
        if not certain.any() or self.exact.all():
            return np.asarray(certain)
        # A few of the others rule out most rows. Then all are looked at that reach the lowest of the remaining rows:
        # few do, and the others are certainly below.
        for step in (SCREENED, 1):
            checked = np.flatnonzero(certain)
            lowest = least[checked].min(initial=np.inf)
            near = np.flatnonzero((self.upper[::step] + self.rounding) / divisor >= lowest) * step
            low, high = bounds(near)
            reaching = high >= lowest
            exact, low, high = self.exact[near[reaching]], low[reaching], high[reaching]
            partial = _overlapping(least[checked], most[checked], low[~exact], high[~exact])
            both = partial + _overlapping(least[checked], most[checked], low[exact], high[exact])
            # A neuron that is not exact overlaps itself.
            certain[checked] = np.where(self.exact[rows[checked]], partial == 0, both <= 1)
        return np.asarray(certain)


def _overlapping(
    least: Float64[ndarray, " row"],
    most: Float64[ndarray, " row"],
    others_least: Float64[ndarray, " other"],
    others_most: Float64[ndarray, " other"],
) -> Int64[ndarray, " row"]:
    """Return for each interval how many of the others it overlaps."""
    below = np.searchsorted(np.sort(others_most), least, side="left")
    not_above = np.searchsorted(np.sort(others_least), most, side="right")
    return np.asarray(not_above - below)


AddUp = Callable[[], ConceptScores]
"""Adds up a concept's rows; may be called in any thread."""


class _Scratch(threading.local):
    """Arrays over all neurons of one thread, as they are between two concepts."""

    def __init__(self, neurons: int) -> None:
        self.kept = np.zeros(neurons, bool)
        """False everywhere."""
        self.place = np.zeros(neurons, np.int64)
        """Anything."""


class ConceptMerge:
    """Adds up the `concepts` and `totals` of shards; the result does not depend on how the data was cut.

    `cuts` are the concepts at which a new range starts. Only one range of concepts is in memory at a time; the others
    are in `scratch`.
    """

    def __init__(self, neurons: int, cuts: Sequence[str] = (), scratch: ScratchFile | None = None) -> None:
        self.neurons = neurons
        self.total = np.zeros(neurons)
        self.total_squares = np.zeros(neurons)
        self.n = 0
        self.shards = 0
        self._rows = Spill(PARTS["concepts"], cuts, scratch)
        self._largest = 0.0
        """The largest of `total_squares`, once all shards are added."""
        self._lowest_first = np.zeros(0, np.int64)
        """All neurons by rising total, once all shards are added."""
        self._scratch = _Scratch(neurons)

    def add(self, concepts: pa.Table, totals: pa.Table) -> None:
        """Add one shard."""
        self.add_totals(totals)
        self.add_concepts(concepts)

    def add_totals(self, totals: pa.Table, shards: int = 1) -> None:
        """Add the totals of a shard, or of so many that are added up already."""
        # Totals cover all neurons, kept or not: `specific` and `selective` need what they do elsewhere.
        self.total += list_values(totals["score"])[0]
        self.total_squares += list_values(totals["score_squares"])[0]
        self.n += totals["n"][0].as_py()
        self.shards += shards

    def add_concepts(self, concepts: pa.Table) -> None:
        """Add the sums of a shard's concepts."""
        self._rows.add(_as_lists(concepts), "concept")

    def ranges(self) -> Iterator[Iterator[tuple[str, AddUp]]]:
        """Yield each range's concepts, in alphabetical order, once all shards are added."""
        self._largest = float(np.max(self.total_squares, initial=0.0))
        self._lowest_first = np.argsort(self.total, kind="stable")
        for rows in self._rows.ranges():
            yield self._scores(rows)

    def rounding(self, n: int, shards: int) -> float:
        """Return the largest rounding error of a sum of n scores that is added up per shard.

        The standard bound, additions · eps · Σ |score|, with the Cauchy-Schwarz inequality for the last factor. It also
        holds for sums of shards' bounds, each of which may come from a different neuron.
        """
        return float(4 * np.finfo(np.float64).eps * (n + shards) * np.sqrt(n * shards * self._largest))

    def lowest_total(self, without: Int64[ndarray, " neuron"]) -> float:
        """Return the lowest total of a neuron that is not one of these; infinite if there is none."""
        kept = self._scratch.kept
        kept[without] = True
        # The first of them that is not in the list is rarely far.
        found = next((neuron for neuron in self._lowest_first if not kept[neuron]), None)
        kept[without] = False
        return np.inf if found is None else float(self.total[found])

    def _scores(self, rows: pa.Table) -> Iterator[tuple[str, AddUp]]:
        names, counts = rows["concept"].to_pylist(), rows["n"].to_numpy()
        bounds, floors = rows["bound"].to_numpy(), rows["floor"].to_numpy()
        everything = bool(rows["neuron"].null_count)
        kept = [] if everything else list_values(rows["neuron"])
        columns = [list_values(rows[name]) for name in SUMS]
        places = defaultdict(list)
        for place, name in enumerate(names):
            places[name].append(place)
        for name in sorted(places):
            own = places[name]
            sums = [[column[place] for place in own] for column in columns]
            if everything:
                yield name, partial(self._complete, counts[own], sums)
            else:
                lists = [kept[place] for place in own]
                yield name, partial(self._bounded, lists, counts[own], bounds[own], floors[own], sums)

    def _complete(self, counts: Int64[ndarray, " shard"], sums: Sequence[Sequence[ndarray]]) -> ConceptScores:
        """Return the scores of a concept of which shards kept all neurons."""
        n = int(counts.sum())
        score, squares, activation = map(_sum_in_order, _with_squares(counts, sums))
        every, exact = np.arange(self.neurons), np.ones(self.neurons, bool)
        rounding = self.rounding(n, len(counts))
        return ConceptScores(n, every, score, squares, activation, score, score, exact, -np.inf, rounding)

    def _bounded(
        self,
        kept: Sequence[ndarray],
        counts: Int64[ndarray, " shard"],
        bounds: Float64[ndarray, " shard"],
        floors: Float64[ndarray, " shard"],
        sums: Sequence[Sequence[ndarray]],
    ) -> ConceptScores:
        """Return the scores of a concept of which shards kept some neurons."""
        neuron, where = self._union(kept)
        lengths = list(map(len, kept))
        n, rounding = int(counts.sum()), self.rounding(int(counts.sum()), len(counts))

        def added(values: ndarray) -> Float64[ndarray, " neuron"]:
            # In the order of shards: sums in fp64 depend on it.
            return np.bincount(where, weights=values, minlength=len(neuron))

        score, squares, activation = (added(np.concatenate(column)) for column in _with_squares(counts, sums))
        # A shard keeps a neuron at most once per row.
        exact = np.bincount(where, minlength=len(neuron)) == len(counts)
        # Bounds of the whole concept, less those of the shards that kept a neuron.
        upper, lower = (
            np.where(exact, score, score + _in_order(values) - added(np.repeat(values, lengths)) + error)
            for values, error in ((bounds, rounding), (floors, -rounding))
        )
        return ConceptScores(
            n=n,
            neuron=neuron,
            # What a shard left out may be negative, so the sum so far can exceed the largest possible total.
            score=np.clip(score, lower, upper),
            squares=squares,
            activation=activation,
            lower=lower,
            upper=upper,
            exact=exact,
            left_out=_in_order(bounds) + rounding if len(neuron) < self.neurons else -np.inf,
            rounding=rounding,
        )

    def _union(self, kept: Sequence[ndarray]) -> tuple[Int64[ndarray, " neuron"], Int64[ndarray, " entry"]]:
        """Return the neurons that any shard kept, in order, and the place among them of every entry."""
        # Converted once: indexing would convert other integers each time.
        entries, scratch = np.concatenate(kept, dtype=np.intp), self._scratch
        scratch.kept[entries] = True
        neurons = np.flatnonzero(scratch.kept)
        scratch.kept[neurons] = False
        scratch.place[neurons] = np.arange(len(neurons))
        return neurons, scratch.place.take(entries)


def _with_squares(counts: Int64[ndarray, " shard"], sums: Sequence[Sequence[ndarray]]) -> list[Sequence[ndarray]]:
    """Return the sums with the squares of single occurrences, which are not written; see `ConceptSums`."""
    score, squares, activation = sums
    written = [one**2 if n == 1 else many for n, one, many in zip(counts, score, squares, strict=True)]
    return [score, written, activation]


def _in_order(values: Float64[ndarray, " shard"]) -> float:
    """Return the sum from the first to the last; `np.sum` would add in pairs."""
    return float(np.cumsum(values)[-1])


def _sum_in_order(vectors: Sequence[ndarray]) -> Float64[ndarray, " neuron"]:
    total = np.array(vectors[0], np.float64)
    for vector in vectors[1:]:
        total += vector
    return total


def _as_lists(concepts: pa.Table) -> pa.Table:
    """Return the part with lists of numbers; runs of earlier versions have raw bytes."""
    for name, dtype in SUMS.items():
        if pa.types.is_large_binary(concepts[name].type):
            lists = pa.array(vectors(concepts[name], dtype), PARTS["concepts"].field(name).type)
            concepts = concepts.set_column(concepts.schema.get_field_index(name), PARTS["concepts"].field(name), lists)
    return concepts
