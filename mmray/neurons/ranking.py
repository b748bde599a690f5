"""From merged sums to the rankings: every concept's neurons by score, by what is specific to it, and by share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64
from numpy import ndarray

from mmray.neuron_names import neuron_name
from mmray.neurons.reduction import ConceptMerge, ConceptScores
from mmray.tables import SCHEMAS

RANKED = 256
"""Neurons a concept in `rankings`, by score, and as many by `specific`."""


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
    """Return mean contribution minus max(0, mean contribution to the noun at all other nouns' occurrences).

    Neurons that serve every noun head the plain ranking of a pre-trained model; this takes their common part away.
    """
    others = n - scores.n
    elsewhere = (total[scores.neuron] - scores.score) / others if others else np.zeros(len(scores.score))
    return scores.score / scores.n - np.maximum(0, elsewhere)


def rank_concept(
    concept: str,
    scores: ConceptScores,
    merge: ConceptMerge,
    shares: Shares,
    widths: Sequence[int],
    tokens: pa.ChunkedArray,
) -> pa.Table:
    """Return the concept's rows of `rankings`: the RANKED highest by score and by `specific`, in order of score.

    Ties go to the lower layer and unit. `tokens` is what every neuron writes, by its index over all layers.
    """
    specific = specific_scores(scores, merge.total, merge.n)
    by_score = np.lexsort((scores.neuron, -scores.score))
    by_specific = np.lexsort((scores.neuron, -specific))
    rank = np.empty(len(by_score), np.int64)
    rank[by_score] = np.arange(1, len(by_score) + 1)
    specific_rank = np.empty_like(rank)
    specific_rank[by_specific] = np.arange(1, len(rank) + 1)
    rows = by_score[(rank[by_score] <= RANKED) | (specific_rank[by_score] <= RANKED)]
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
            "tokens": tokens.take(pa.array(neurons)),
            "certified": scores.certified()[rows],
        },
        schema=SCHEMAS["rankings"],
    )
