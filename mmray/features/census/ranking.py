"""Rankings from merged sums: each concept's neurons by score, and by how specific and how selective it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64
from numpy import ndarray

from mmray.features.census.decoding import written_tokens
from mmray.features.census.pair_counts import PairCounts
from mmray.features.census.reduction import ConceptMerge, ConceptScores
from mmray.features.census.tables import TABLES
from mmray.neuron_names import neuron_name

RANKED = 256
"""Neurons per concept in `rankings` by score, and as many by `specific` and by `selective`."""

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
    return _specific(scores.score, scores.n, total[scores.neuron], n - scores.n)


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
    elsewhere = (squares[scores.neuron] - scores.squares) / others if others else np.zeros(len(scores.score))
    return scores.score / scores.n - np.sqrt(np.maximum(0, elsewhere))


def specific_certified(scores: ConceptScores, merge: ConceptMerge) -> ndarray:
    """Return for each neuron whether its rank by `specific` is certain.

    The total over all nouns is known for every neuron, and `specific` grows with the sum over the concept. So the
    bounds of that sum give bounds of `specific`.
    """
    others, rounding = merge.n - scores.n, merge.rounding(merge.n, merge.shards)
    total = merge.total[scores.neuron]
    outside = np.ones(merge.neurons, bool)
    outside[scores.neuron] = False
    left_out = -np.inf
    if outside.any():
        # `specific` falls with the total, so the lowest total gives the bound for neurons that no shard kept.
        lowest = merge.total.min(where=outside, initial=np.inf, keepdims=True) - rounding
        left_out = float(_specific(np.array([scores.left_out]), scores.n, lowest, others)[0])
    least = _specific(scores.lower - scores.rounding, scores.n, total + rounding, others)
    most = _specific(scores.upper + scores.rounding, scores.n, total - rounding, others)
    return scores.certify(least, most, left_out)


def selective_certified(scores: ConceptScores, merge: ConceptMerge) -> ndarray:
    """Return for each neuron whether its rank by `selective` is certain.

    The squares that shards left out may all belong to the concept. So the bound of a neuron known in part is the bound
    of its mean contribution.
    """
    others, total = merge.n - scores.n, merge.total_squares[scores.neuron]
    # Squares are non-negative, so their own total bounds the rounding.
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
    """Return the certified fraction of the TOP_RANKS highest ranks by score, over concepts with MIN_OCCURRENCES.

    None if there are no such concepts. A rarer noun occurs in few shards, so its ranks are certified anyway.
    """
    top = pc.and_(pc.less_equal(rankings["rank"], TOP_RANKS), pc.greater_equal(rankings["n"], MIN_OCCURRENCES))
    certified = rankings["certified"].filter(top)
    return pc.mean(certified).as_py() if len(certified) else None


def rank_concept(
    concept: str,
    merge: ConceptMerge,
    images: int,
    hits: PairCounts,
    widths: Sequence[int],
    decoded: pa.Table,
) -> pa.Table:
    """Return the concept's rows of `rankings`: the RANKED highest by each of three orders, in order of score.

    Ties go to the lower layer and unit. `images` is the number of different images of its occurrences. `hits` counts
    the occurrences that have a neuron in their top-k. `decoded` has the tokens that each neuron promotes and
    suppresses; the sign of the mean activation decides which of them are the `tokens` it writes here.
    """
    scores = merge.sums(concept)
    specific = specific_scores(scores, merge.total, merge.n)
    selective = selective_scores(scores, merge.total_squares, merge.n)
    by_score, rank = _ranked(scores, scores.score)
    _, specific_rank = _ranked(scores, specific)
    _, selective_rank = _ranked(scores, selective)
    # A neuron that is high in one order only is kept too, with its ranks in the others.
    rows = by_score[np.minimum(np.minimum(rank, specific_rank), selective_rank)[by_score] <= RANKED]
    neurons = scores.neuron[rows]
    layer, unit = locate_index(widths, neurons)
    mean = scores.score[rows] / scores.n
    # Rounding can push a variance of zero slightly below it.
    variance = scores.squares[rows] / scores.n - mean**2
    return pa.table(
        {
            "concept": pa.array([concept] * len(rows)),
            "rank": rank[rows],
            "layer": layer,
            "unit": unit,
            "neuron": list(map(neuron_name, layer.tolist(), unit.tolist())),
            "score": mean,
            "score_std": np.sqrt(np.maximum(0, variance)),
            "specific": specific[rows],
            "specific_rank": specific_rank[rows],
            "n": np.full(len(rows), scores.n),
            "share": hits.count(concept, neurons) / scores.n,
            "activation": scores.activation[rows] / scores.n,
            "tokens": written_tokens(decoded, neurons, scores.activation[rows]),
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
    order = np.lexsort((scores.neuron, -values))  # the last key sorts first; ties go to the lower index
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return order, rank
