"""What located neurons mean, as definitions: sets that agree, words that are written, scores that tell nouns apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmray.neurons.inflection import lemma


def highest(scores: Float[Tensor, "place neuron"], count: int) -> list[frozenset[int]]:
    """Return of each place its `count` highest neurons."""
    count = min(count, scores.shape[1])
    return [frozenset(row) for row in scores.topk(count, dim=1).indices.tolist()]


def overlap(one: frozenset[int], other: frozenset[int]) -> float:
    """Return |T ∩ T'| / n of two sets of n neurons."""
    return len(one & other) / max(len(one), 1)


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Return |T ∩ T'| / |T ∪ T'|."""
    return len(one & other) / max(len(one | other), 1)


def pairwise_jaccard(sets: Sequence[frozenset[int]]) -> list[float]:
    """Return of each set the mean Jaccard index with the others; empty for fewer than two."""
    count = len(sets)
    sums = [0.0] * count
    for one, other in combinations(range(count), 2):
        index = jaccard(sets[one], sets[other])
        sums[one] += index
        sums[other] += index
    return [total / (count - 1) for total in sums] if count > 1 else []


def common_share(sets: Sequence[frozenset[int]]) -> float:
    """Return the part of the neurons that all sets have in common."""
    return len(frozenset.intersection(*sets)) / max(len(sets[0]), 1)


def exact_hit(tokens: Iterable[str], word: str) -> bool:
    """Return whether one of the decoded tokens is the word, in any case."""
    return any(token.casefold() == word.casefold() for token in tokens)


def lemma_hit(tokens: Iterable[str], concept: str, first: str, language: str | None) -> bool:
    """Return whether one of the decoded tokens is the concept in any form, or its own first token as it is scored."""
    wanted = {concept, first.casefold(), lemma(concept, language).casefold()}
    return any(token.casefold() in wanted or lemma(token, language).casefold() in wanted for token in tokens)


def above(own: Float[Tensor, " own"], others: Float[Tensor, " other"]) -> Float[Tensor, " own"]:
    """Return of each own value the part of the others that lie below it, a tie being half: their mean is the AUROC."""
    below = (own[:, None] > others[None, :]).float() + 0.5 * (own[:, None] == others[None, :]).float()
    return below.mean(dim=1)


def placements(
    own: Float[Tensor, " own"], others: Float[Tensor, " other"]
) -> tuple[Float[Tensor, " own"], Float[Tensor, " other"]]:
    """Return each value's part in the AUROC: of own values as `above`; of others the deviation from the AUROC.

    The deviations add up to 0. They are scaled so that Σ both / number of own values, with values drawn again on both
    sides, varies as the AUROC does to first order (its two placement components, DeLong et al. 1988).
    """
    parts = above(own, others)
    apart = (above(-others, -own) - parts.mean()) * (len(own) / len(others))
    return parts, apart


def set_mean(scores: Float[Tensor, "place neuron"], neurons: Int[Tensor, " neuron"]) -> Float[Tensor, " place"]:
    """Return at each place the mean score of these neurons."""
    return scores[:, neurons].mean(dim=1)


def specific_order(scores: Float[Tensor, "place neuron"], own: Bool[Tensor, " place"]) -> Float[Tensor, " neuron"]:
    """Return the mean score at the own places less max(0, that at the others)."""
    elsewhere = scores[~own].mean(dim=0).clamp(min=0) if bool((~own).any()) else torch.zeros(scores.shape[1])
    return scores[own].mean(dim=0) - elsewhere
