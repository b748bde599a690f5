"""Rankings from merged sums: each concept's neurons by score, and by how specific and how selective it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64, Shaped
from numpy import ndarray

from mmray.features.census.concept_merge import ConceptMerge, ConceptScores
from mmray.features.census.tables import TABLES
from mmray.features.census.written_tokens import written_tokens
from mmray.neuron_names import PLAIN, NeuronNames

RANKED = 256
"""Neurons per concept in `rankings` by score, and as many by `specific` and by `selective`."""

SAMPLED = 16
"""Of so many values one is in the sample that tells which are high."""

TOP_RANKS, MIN_OCCURRENCES = 10, 5
"""Ranks per concept, and occurrences that a concept needs, for the certified share that a run reports."""


def locate_index(widths: Sequence[int], index: Int64[ndarray, " neuron"]) -> tuple[ndarray, ndarray]:
    """Return layer and unit of neurons, given their index over all layers."""
    starts = np.cumsum([0, *widths])
    layer = np.searchsorted(starts, index, side="right") - 1
    return layer, index - starts[layer]


def specific_scores(scores: ConceptScores, total: Float64[ndarray, " all"], n: int) -> Float64[ndarray, " neuron"]:
    """Return each neuron's mean contribution minus its mean contribution at all other occurrences, to the noun there.

    A mean below zero elsewhere counts as zero. Neurons that contribute to every noun lead a pre-trained model's ranking
    by score; this subtracts their common part.
    """
    return _specific(scores.score, scores.n, total.take(scores.neuron), n - scores.n)


def _specific(
    score: Float64[ndarray, " neuron"], n: int, total: Float64[ndarray, " neuron"], others: int
) -> Float64[ndarray, " neuron"]:
    # With a single concept there is nothing elsewhere.
    elsewhere = (total - score) / others if others else np.zeros(len(score))
    return score / n - np.maximum(0, elsewhere)


def selective_scores(scores: ConceptScores, squares: Float64[ndarray, " all"], n: int) -> Float64[ndarray, " neuron"]:
    """Return each neuron's mean contribution minus its RMS contribution at all other occurrences, to the noun there.

    A neuron that promotes one other noun and suppresses the next has a mean near zero elsewhere, but a large RMS. Of
    the sums that shards can add up exactly, the RMS says most about what ablating the neuron does to other nouns.
    """
    others = n - scores.n
    elsewhere = (squares.take(scores.neuron) - scores.squares) / others if others else np.zeros(len(scores.score))
    return scores.score / scores.n - np.sqrt(np.maximum(0, elsewhere))


def specific_certified(scores: ConceptScores, rows: Int64[ndarray, " row"], merge: ConceptMerge) -> ndarray:
    """Return for each of these rows whether its rank by `specific` is certain.

    The total over all nouns is known for every neuron, and `specific` grows with the sum over the concept. So the
    bounds of that sum give bounds of `specific`.
    """
    others, rounding = merge.n - scores.n, merge.rounding(merge.n, merge.shards)
    left_out = -np.inf
    if len(scores.neuron) < merge.neurons:
        # `specific` falls with the total, so the lowest total gives the bound for neurons that no shard kept.
        lowest = merge.lowest_total(scores.neuron) - rounding
        left_out = float(_specific(np.array([scores.left_out]), scores.n, np.array([lowest]), others)[0])

    def bounds(some: Int64[ndarray, " some"]) -> tuple[Float64[ndarray, " some"], Float64[ndarray, " some"]]:
        total = merge.total.take(scores.neuron.take(some))
        return (
            _specific(scores.lower.take(some) - scores.rounding, scores.n, total + rounding, others),
            _specific(scores.upper.take(some) + scores.rounding, scores.n, total - rounding, others),
        )

    return scores.certify(rows, bounds, left_out, scores.n)


def selective_certified(scores: ConceptScores, rows: Int64[ndarray, " row"], merge: ConceptMerge) -> ndarray:
    """Return for each of these rows whether its rank by `selective` is certain.

    The squares that shards left out may all belong to the concept. So the bound of a neuron known in part is the bound
    of its mean contribution.
    """
    others = merge.n - scores.n

    def bounds(some: Int64[ndarray, " some"]) -> tuple[Float64[ndarray, " some"], Float64[ndarray, " some"]]:
        total = merge.total_squares.take(scores.neuron.take(some))
        # Squares are non-negative, so their own total bounds the rounding.
        rounding = 4 * np.finfo(np.float64).eps * (merge.n + merge.shards) * total
        squares = np.maximum(0, total - scores.squares.take(some))
        highest, lowest = (
            np.sqrt(np.maximum(0, squares + error) / others) if others else np.zeros(len(squares))
            for error in (rounding, -rounding)
        )
        return (
            (scores.lower.take(some) - scores.rounding) / scores.n - highest,
            (scores.upper.take(some) + scores.rounding) / scores.n - np.where(scores.exact.take(some), lowest, 0),
        )

    return scores.certify(rows, bounds, scores.left_out / scores.n, scores.n)


def certified_counts(rankings: pa.Table) -> tuple[int, int]:
    """Return how many of the TOP_RANKS highest ranks by score are certified, and how many there are.

    Only of concepts with MIN_OCCURRENCES. A rarer noun occurs in few shards, so its ranks are certified anyway.
    """
    top = pc.and_(pc.less_equal(rankings["rank"], TOP_RANKS), pc.greater_equal(rankings["n"], MIN_OCCURRENCES))
    certified = rankings["certified"].filter(top)
    return pc.sum(certified).as_py() or 0, len(certified)


@dataclass(frozen=True)
class Uses:
    """Where a concept occurs: arrays over all its occurrences in the run."""

    images: Shaped[ndarray, " occurrence"]
    """A number per image."""
    neurons: Shaped[ndarray, " entry"]
    """The neurons in the top-k of its occurrences."""


NO_USES = Uses(np.zeros(0, np.uint64), np.zeros(0, np.int32))


@dataclass(frozen=True)
class RankedNeurons:
    """The neurons of one concept that `rankings` lists, in order of score."""

    concept: str
    n: int
    images: int
    """Different images among the occurrences."""
    neuron: Int64[ndarray, " row"]
    columns: Mapping[str, Shaped[ndarray, " row"]]
    """Columns of `rankings`, and the sums that others are made from."""
    top: Int64[ndarray, " top"]
    """The neurons in its top-k by score, listed or not."""


def rank_concept(
    concept: str, scores: ConceptScores, merge: ConceptMerge, uses: Uses = NO_USES, top_k: int = 1
) -> RankedNeurons:
    """Return the concept's neurons: the RANKED highest by each of three orders, in order of score.

    Ties go to the lower layer and unit.
    """
    orders = {
        "rank": scores.score,
        "specific_rank": specific_scores(scores, merge.total, merge.n),
        "selective_rank": selective_scores(scores, merge.total_squares, merge.n),
    }
    # A neuron that is high in one order only is kept too, with its ranks in the others.
    first = {name: highest(values, RANKED) for name, values in orders.items()}
    listed = np.unique(np.concatenate(list(first.values())))
    rows = listed[np.argsort(-scores.score[listed], kind="stable")]
    neurons, counted = scores.neuron[rows], np.sort(uses.neurons)
    return RankedNeurons(
        concept,
        scores.n,
        len(np.unique(uses.images)),
        neurons,
        {name: ranks(values, rows) for name, values in orders.items()}
        | {
            "score": scores.score[rows],
            "squares": scores.squares[rows],
            "activation": scores.activation[rows],
            "specific": orders["specific_rank"][rows],
            "selective": orders["selective_rank"][rows],
            "hits": np.searchsorted(counted, neurons, side="right") - np.searchsorted(counted, neurons),
            "certified": scores.certified(rows),
            "certified_specific": specific_certified(scores, rows, merge),
            "certified_selective": selective_certified(scores, rows, merge),
            "exact": scores.exact[rows],
        },
        scores.neuron[first["rank"][:top_k] if top_k <= RANKED else highest(scores.score, top_k)],
    )


def neuron_names(widths: Sequence[int], names: NeuronNames = PLAIN) -> pa.StringArray:
    """Return the names of all neurons, in order of their index."""
    return pa.concat_arrays([pa.array([], pa.string()), *(names.names(layer, w) for layer, w in enumerate(widths))])


def ranking_table(
    ranked: Sequence[RankedNeurons], widths: Sequence[int], names: pa.StringArray, decoded: pa.Table
) -> pa.Table:
    """Return the rows of `rankings` of these concepts, in their order.

    `names` are those of all neurons. `decoded` has the tokens that each neuron promotes and suppresses; the sign of the
    mean activation decides which of them are the `tokens` it writes here.
    """
    if not ranked:
        return TABLES["rankings"].empty_table()
    lengths = [len(one.neuron) for one in ranked]
    columns = {name: np.concatenate([one.columns[name] for one in ranked]) for name in ranked[0].columns}
    neurons, n = np.concatenate([one.neuron for one in ranked]), np.repeat([one.n for one in ranked], lengths)
    layer, unit = locate_index(widths, neurons)
    # Sums become means. Squares and hits are no columns of the table themselves.
    score, squares, activation, hits = (columns.pop(name) / n for name in ("score", "squares", "activation", "hits"))
    return pa.table(
        columns
        | {
            "concept": pa.array(np.repeat(np.array([one.concept for one in ranked], object), lengths), pa.string()),
            "layer": layer,
            "unit": unit,
            "neuron": names.take(pa.array(neurons)),
            "score": score,
            # Rounding can push a variance of zero slightly below it.
            "score_std": np.sqrt(np.maximum(0, squares - score**2)),
            "n": n,
            "share": hits,
            "activation": activation,
            "tokens": written_tokens(decoded, neurons, activation),
            "n_images": np.repeat([one.images for one in ranked], lengths),
        },
        schema=TABLES["rankings"],
    )


def highest(values: Float64[ndarray, " value"], count: int) -> Int64[ndarray, " highest"]:
    """Return where the `count` highest values are, highest first; of equal values the first counts as higher."""
    place = np.arange(len(values))
    if SAMPLED * count < len(values):
        # A sample tells what about twice as many values reach. If it misleads, all are looked at.
        sample, last = values[::SAMPLED], -(-2 * count // SAMPLED)
        reaching = np.flatnonzero(values >= np.partition(sample, len(sample) - last)[len(sample) - last])
        place = reaching if len(reaching) >= count else place
    if count < len(place):
        # A partition instead of a sort of all; every value that equals the last one is looked at.
        found = values[place]
        place = place[found >= np.partition(found, len(found) - count)[len(found) - count]]
    return place[np.argsort(-values[place], kind="stable")][:count]


def ranks(values: Float64[ndarray, " value"], rows: Int64[ndarray, " row"]) -> Int64[ndarray, " row"]:
    """Return the rank from 1, by falling value, of the values in these places; of equal values the first is higher."""
    own = values[rows]
    # None below the lowest of them can be above any.
    above = values[values >= own.min(initial=np.inf)]
    largest = np.abs(above).max(initial=0)
    bucket, own_bucket = _buckets(above, largest), _buckets(own, largest)
    counts = np.bincount(bucket, minlength=1)
    shared = np.zeros(len(counts), bool)
    shared[own_bucket] = True
    # Only values in a bucket with one of the rows need sorting; the others are counted by bucket.
    order = np.sort(above[shared.take(bucket)])
    higher = np.cumsum(np.where(shared, 0, counts)[::-1])[::-1]
    after = np.searchsorted(order, own, side="right")
    rank: Int64[ndarray, " row"] = 1 + higher[own_bucket] + len(order) - after
    tied = np.flatnonzero(after - np.searchsorted(order, own, side="left") > 1)
    for value in np.unique(own[tied]):
        here = tied[own[tied] == value]
        rank[here] += np.searchsorted(np.flatnonzero(values == value), rows[here])
    return rank


def _buckets(values: Float64[ndarray, " value"], largest: float) -> Int64[ndarray, " value"]:
    """Return a number from 0 per value, which never falls where values rise: 256 per power of two, from largest/2³²."""
    # Read as an integer, the bits of a float without its sign rise with it; the first 20 are sign, exponent and 8 more.
    highest = int(np.float64(largest).view(np.int64) >> 44)
    steps = np.maximum(0, (np.abs(values).view(np.int64) >> 44) - max(0, highest - 32 * 256))
    return np.asarray(32 * 256 + np.where(values < 0, -steps, steps))
