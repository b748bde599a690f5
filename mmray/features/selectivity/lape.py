"""Counts of active tokens by label → each label's neurons: LAPE, and DAPE, which is LAPE over another label.

Tang et al. 2024, *Language-Specific Neurons* (arXiv 2402.16438); Huo et al. 2024, *MMNeuron* (arXiv 2406.11193). The
steps, thresholds and the order of ties are those of the authors' code, in float64 where that has float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from mmray.features.selectivity.settings import BAR, RATE


@dataclass(frozen=True)
class Chosen:
    """The neurons chosen, those that stand out most first, and the labels that each belongs to: none, one or several.

    `score` orders them: lowest entropy (nats) or highest contrast (logits) first.
    """

    neurons: Int[Tensor, " chosen"]
    """Indices over all layers."""
    member: Bool[Tensor, "chosen label"]
    score: Float[Tensor, " chosen"]

    def of(self, label: int) -> Int[Tensor, " own"]:
        """Return a label's neurons, those that stand out most first."""
        return self.neurons[self.member[:, label]]


def probabilities(active: Float[Tensor, "neuron label"], tokens: Float[Tensor, " label"]) -> Float64[Tensor, "n l"]:
    """Return the part of a label's tokens at which each neuron is active; of a label without tokens 0."""
    return torch.nan_to_num(active.double() / tokens.double(), nan=0.0)


def entropies(amounts: Float[Tensor, "neuron label"]) -> Float64[Tensor, " neuron"]:
    """Return, in nats, how evenly each neuron's amounts are spread over the labels: 0 for one label alone.

    A neuron with nothing anywhere has entropy 0 too; published, the filter that follows is what drops it.
    """
    shares = torch.nan_to_num(amounts.double() / amounts.double().sum(dim=1, keepdim=True), nan=0.0)
    logs = torch.where(shares > 0, shares.log(), 0.0)
    return -(shares * logs).sum(dim=1)


def bar_of(probability: Float[Tensor, "neuron label"], quantile: float = BAR) -> float:
    """Return the value below or at which that part of all probabilities lies, as `kthvalue` counts."""
    flat = probability.flatten()
    return float(flat.kthvalue(max(1, round(len(flat) * quantile))).values)


def filtered_entropies(probability: Float[Tensor, "neuron label"], bar: float) -> Float64[Tensor, " neuron"]:
    """Return the entropies, infinite where the neuron exceeds the bar under no label."""
    found = entropies(probability)
    found[(probability > bar).sum(dim=1) == 0] = torch.inf
    return found


def choose(
    active: Float[Tensor, "neuron label"], tokens: Float[Tensor, " label"], rate: float = RATE, quantile: float = BAR
) -> Chosen:
    """Return the round(rate · neurons) neurons of lowest entropy among those that exceed the bar, with their labels.

    A neuron belongs to every label under which it exceeds the bar. Where fewer exceed it than are to be chosen, the
    rest are neurons of no label, as published. Of equal entropies those are taken that `torch.topk` takes.
    """
    probability = probabilities(active, tokens)
    bar = bar_of(probability, quantile)
    entropy = filtered_entropies(probability, bar)
    lowest = entropy.topk(round(len(entropy) * rate), largest=False)
    return Chosen(lowest.indices, probability[lowest.indices] > bar, lowest.values)
