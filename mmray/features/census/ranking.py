"""From merged sums to the rankings: every concept's neurons by score, by what is specific to it, and by share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64
from numpy import ndarray

from mmray.features.census.decoding import written
from mmray.features.census.reduction import ConceptMerge, ConceptScores
from mmray.features.census.tables import TABLES
from mmray.neuron_names import neuron_name

RANKED = 256
"""Neurons a concept in `rankings`, by score, and as many by `specific` and by `selective`."""

CERTAIN, OFTEN = 10, 5
"""Ranks of each concept, and occurrences that it has at least, of which a run says how many are certified."""


@dataclass(frozen=True)
class Shares:
    """In how many of its occurrences' top-k a neuron is: (concept, neuron) pairs with their counts, as arrays."""

    hits: dict[str, tuple[Int64[ndarray, " neuron"], Int64[ndarray, " neuron"]]]

    def of(self, concept: str, neurons: Int64[ndarray, " neuron"]) -> Int64[ndarray, " neuron"]:
        """Return the counts for these neurons of the concept."""
        listed, counts = self.hits.get(concept, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
        if not len(listed):
            return np.zeros(len(neurons), np.int64)
        places = np.searchsorted(listed, neurons).clip(max=len(listed) - 1)
        found: Int64[ndarray, " neuron"] = np.where(listed[places] == neurons, counts[places], 0)
        return found


def locate_index(widths: Sequence[int], index: Int64[ndarray, " neuron"]) -> tuple[ndarray, ndarray]:
    """Return layer and unit of neurons numbered over all layers."""
    starts = np.cumsum([0, *widths])
    layer = np.searchsorted(starts, index, side="right") - 1
    return layer, index - starts[layer]


def specific_scores(scores: ConceptScores, total: Float64[ndarray, " all"], n: int) -> Float64[ndarray, " neuron"]:
    """Return mean contribution minus max(0, mean contribution at all other occurrences, each to the noun there).

    Neurons that serve every noun head the plain ranking of a pre-trained model; this takes their common part away.
    """
    return _specific(scores.score, scores.n, total[scores.neuron], n - scores.n)


def _specific(
    score: Float64[ndarray, " neuron"], n: int, total: Float64[ndarray, " neuron"], others: int
) -> Float64[ndarray, " neuron"]:
    elsewhere = (total - score) / others if others else np.zeros(len(score))
    return score / n - np.maximum(0, elsewhere)


def selective_scores(scores: ConceptScores, squares: Float64[ndarray, " all"], n: int) -> Float64[ndarray, " neuron"]:
    """Return mean contribution minus the root mean square contribution at all other occurrences, each to its noun.

    A neuron that serves one other noun and hurts the next has a mean of nothing elsewhere, and a large mean square: of
    the sums that shards can add up exactly, it is what tells most about what zeroing the neuron does to other nouns.
    """
    others = n - scores.n
    elsewhere = (squares[scores.neuron] - scores.squares) / others if others else np.zeros(len(scores.score))
    return scores.score / scores.n - np.sqrt(np.maximum(0, elsewhere))


def specific_certified(scores: ConceptScores, merge: ConceptMerge) -> ndarray:
    """Return for each neuron whether its place in the order of `specific` is known.

    The total over all nouns is known of every neuron, and `specific` grows with the sum over the concept: the bounds of
    that sum give its own.
    """
    others, rounding = merge.n - scores.n, merge.rounding(merge.n, merge.shards)
    total = merge.total[scores.neuron]
    outside = np.ones(merge.neurons, bool)
    outside[scores.neuron] = False
    left_out = -np.inf
    if outside.any():
        # It falls with the total: the highest is that of the lowest total.
        lowest = merge.total.min(where=outside, initial=np.inf, keepdims=True) - rounding
        left_out = float(_specific(np.array([scores.left_out]), scores.n, lowest, others)[0])
    least = _specific(scores.lower - scores.rounding, scores.n, total + rounding, others)
    most = _specific(scores.upper + scores.rounding, scores.n, total - rounding, others)
    return scores.certify(least, most, left_out)


def selective_certified(scores: ConceptScores, merge: ConceptMerge) -> ndarray:
    """Return for each neuron whether its place in the order of `selective` is known.

    The squares that shards left out may all be the concept's own, so that a neuron known in part has at most the bound
    of its mean contribution.
    """
    others, total = merge.n - scores.n, merge.total_squares[scores.neuron]
    rounding = 4 * np.finfo(np.float64).eps * (merge.n + merge.shards) * total
    squares = np.maximum(0, total - scores.squares)
    highest, lowest = (
        np.sqrt(np.maximum(0, squares + error) / others) if others else np.zeros(len(squares))
        for error in (rounding, -rounding)
    )
    least = (scores.lower - scores.rounding) / scores.n - highest
    most = (scores.upper + scores.rounding) / scores.n - np.where(scores.exact, lowest, 0)
    return scores.certify(least, most, scores.left_out / scores.n)


def certified_share(rankings: pa.Table) -> float | None:
    """Return which part of the CERTAIN highest ranks by score is certified, of concepts that are often enough.

    None where no concept is. A noun of few occurrences is in few shards, and certain whatever they keep.
    """
    near = pc.and_(pc.less_equal(rankings["rank"], CERTAIN), pc.greater_equal(rankings["n"], OFTEN))
    certified = rankings["certified"].filter(near)
    return pc.mean(certified).as_py() if len(certified) else None


def rank_concept(
    concept: str,
    merge: ConceptMerge,
    images: int,
    shares: Shares,
    widths: Sequence[int],
    decoded: pa.Table,
) -> pa.Table:
    """Return the concept's rows of `rankings`: the RANKED highest by each of three orders, in order of score.

    Ties go to the lower layer and unit. `images` is the number of different images of its occurrences. `decoded` has
    what every neuron promotes and suppresses, by its index over all layers; `tokens` are those that it writes at this
    concept, by the sign of its mean activation.
    """
    scores = merge.sums(concept)
    specific = specific_scores(scores, merge.total, merge.n)
    selective = selective_scores(scores, merge.total_squares, merge.n)
    by_score, rank = _ranked(scores, scores.score)
    _, specific_rank = _ranked(scores, specific)
    _, selective_rank = _ranked(scores, selective)
    rows = by_score[np.minimum(np.minimum(rank, specific_rank), selective_rank)[by_score] <= RANKED]
    neurons = scores.neuron[rows]
    layer, unit = locate_index(widths, neurons)
    mean = scores.score[rows] / scores.n
    variance = scores.squares[rows] / scores.n - mean**2
    return pa.table(
        {
            "concept": pa.array([concept] * len(rows)),
            "rank": rank[rows],
            "layer": layer,
            "unit": unit,
            "neuron": [neuron_name(*pair) for pair in zip(layer.tolist(), unit.tolist(), strict=True)],
            "score": mean,
            "score_std": np.sqrt(np.maximum(0, variance)),
            "specific": specific[rows],
            "specific_rank": specific_rank[rows],
            "n": np.full(len(rows), scores.n),
            "share": shares.of(concept, neurons) / scores.n,
            "activation": scores.activation[rows] / scores.n,
            "tokens": written(decoded, neurons, scores.activation[rows]),
            "certified": scores.certified()[rows],
            "selective": selective[rows],
            "selective_rank": selective_rank[rows],
            "n_images": np.full(len(rows), images),
            "certified_specific": specific_certified(scores, merge)[rows],
            "certified_selective": selective_certified(scores, merge)[rows],
            "exact": scores.exact[rows],
        },
        schema=TABLES["rankings"],
    )


def _ranked(scores: ConceptScores, values: Float64[ndarray, " neuron"]) -> tuple[Int64[ndarray, " neuron"], ...]:
    """Return the order of the neurons, highest first, and each neuron's rank from 1."""
    order = np.lexsort((scores.neuron, -values))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return order, rank
