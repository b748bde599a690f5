"""Definitions of measures: agreement of sets of neurons, hits of decoded tokens, separation of nouns by scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmray.neurons.inflection import lemma


def highest(scores: Float[Tensor, "position neuron"], count: int) -> list[frozenset[int]]:
    """Return the `count` highest neurons of each position."""
    # Tiny models have fewer neurons than the largest set.
    count = min(count, scores.shape[1])
    return [frozenset(row) for row in scores.topk(count, dim=1).indices.tolist()]


def overlap(one: frozenset[int], other: frozenset[int]) -> float:
    """Return |T ∩ T'| / n for two sets of n neurons."""
    return len(one & other) / max(len(one), 1)


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Return |T ∩ T'| / |T ∪ T'|."""
    return len(one & other) / max(len(one | other), 1)


def pairwise_jaccard(sets: Sequence[frozenset[int]]) -> list[float]:
    """Return each set's mean Jaccard index with the others; empty for fewer than two sets."""
    count = len(sets)
    sums = [0.0] * count
    for one, other in combinations(range(count), 2):
        index = jaccard(sets[one], sets[other])
        sums[one] += index
        sums[other] += index
    return [total / (count - 1) for total in sums] if count > 1 else []


def common_share(sets: Sequence[frozenset[int]]) -> float:
    """Return the fraction of neurons that all sets have in common."""
    return len(frozenset.intersection(*sets)) / max(len(sets[0]), 1)


def writing_share(tokens: Sequence[Sequence[str]], concept: str, first: str, language: str | None) -> float:
    """Return the fraction of neurons that write a form of the concept, or its first token, given each one's tokens."""
    return sum(lemma_hit(own, concept, first, language) for own in tokens) / len(tokens)


def exact_hit(tokens: Iterable[str], word: str) -> bool:
    """Return whether one of the decoded tokens is the word, ignoring case."""
    return any(token.casefold() == word.casefold() for token in tokens)


def lemma_hit(tokens: Iterable[str], concept: str, first: str, language: str | None) -> bool:
    """Return whether one of the decoded tokens is any form of the concept, or its first token, which is scored."""
    targets = {concept, first.casefold(), lemma(concept, language).casefold()}
    return any(token.casefold() in targets or lemma(token, language).casefold() in targets for token in tokens)


def above(own: Float[Tensor, " own"], others: Float[Tensor, " other"]) -> Float[Tensor, " own"]:
    """Return for each own value the fraction of the others below it, ties counting half. Their mean is the AUROC."""
    # All pairs at once: there are at most a few hundred positions.
    below = (own[:, None] > others[None, :]).float() + 0.5 * (own[:, None] == others[None, :]).float()
    return below.mean(dim=1)


def placements(
    own: Float[Tensor, " own"], others: Float[Tensor, " other"]
) -> tuple[Float[Tensor, " own"], Float[Tensor, " other"]]:
    """Return each value's placement in the AUROC: `above` for own values, the deviation from the AUROC for others.

    If values are redrawn on both sides, the sum of both divided by the number of own values varies like the AUROC to
    first order. These are its two placement components (DeLong et al. 1988). The deviations add up to 0.
    """
    own_parts = above(own, others)
    other_parts = (above(-others, -own) - own_parts.mean()) * (len(own) / len(others))
    return own_parts, other_parts


def set_mean(scores: Float[Tensor, "position neuron"], neurons: Int[Tensor, " neuron"]) -> Float[Tensor, " position"]:
    """Return the mean score of these neurons at each position."""
    return scores[:, neurons].mean(dim=1)


def specific_order(
    scores: Float[Tensor, "position neuron"], own: Bool[Tensor, " position"]
) -> Float[Tensor, " neuron"]:
    """Return the mean score at the own positions minus that at the others, where a negative mean counts as zero."""
    # As `specific` in the run's rankings, but over these positions only.
    elsewhere = scores[~own].mean(dim=0).clamp(min=0) if bool((~own).any()) else torch.zeros(scores.shape[1])
    return scores[own].mean(dim=0) - elsewhere
