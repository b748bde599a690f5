"""LAPE: choose each label's neurons by the entropy of their probabilities to be active. DAPE is LAPE over domains.

Tang et al. 2024, *Language-Specific Neurons* (arXiv 2402.16438); Huo et al. 2024, *MMNeuron* (arXiv 2406.11193). Steps,
thresholds and the order of ties follow the authors' code, in float64 instead of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from mmray.features.selectivity.settings import BAR, RATE


@dataclass(frozen=True)
class Chosen:
    """The chosen neurons, the most selective first, and the labels that each belongs to: none, one or several.

    They are in order of `score`: lowest entropy (nats) or highest contrast (logits) first.
    """

    neurons: Int[Tensor, " chosen"]
    """Indices over all layers."""
    member: Bool[Tensor, "chosen label"]
    score: Float[Tensor, " chosen"]

    def of(self, label: int) -> Int[Tensor, " own"]:
        """Return a label's neurons, the most selective first."""
        return self.neurons[self.member[:, label]]


def probabilities(active: Float[Tensor, "neuron label"], tokens: Float[Tensor, " label"]) -> Float64[Tensor, "n l"]:
    """Return the fraction of each label's tokens at which each neuron is active; 0 for a label without tokens."""
    return torch.nan_to_num(active.double() / tokens.double(), nan=0.0)


def entropies(amounts: Float[Tensor, "neuron label"]) -> Float64[Tensor, " neuron"]:
    """Return the entropy, in nats, of each neuron's amounts as a distribution over labels: 0 for a single label.

    A neuron that is never active has entropy 0 too; as published, the filter that follows drops it.
    """
    shares = torch.nan_to_num(amounts.double() / amounts.double().sum(dim=1, keepdim=True), nan=0.0)
    logs = torch.where(shares > 0, shares.log(), 0.0)
    return -(shares * logs).sum(dim=1)


def bar_of(probability: Float[Tensor, "neuron label"], quantile: float = BAR) -> float:
    """Return the quantile of all probabilities, as `kthvalue` counts."""
    # The authors' code takes the bar over all neurons and labels together.
    flat = probability.flatten()
    return float(flat.kthvalue(max(1, round(len(flat) * quantile))).values)


def filtered_entropies(probability: Float[Tensor, "neuron label"], bar: float) -> Float64[Tensor, " neuron"]:
    """Return the entropies, infinite for a neuron that does not exceed the bar under any label."""
    found = entropies(probability)
    # Infinite entropy sorts these neurons last.
    found[(probability > bar).sum(dim=1) == 0] = torch.inf
    return found


def choose(
    active: Float[Tensor, "neuron label"], tokens: Float[Tensor, " label"], rate: float = RATE, quantile: float = BAR
) -> Chosen:
    """Return the round(rate · neurons) neurons with the lowest entropy among those above the bar, with their labels.

    A neuron belongs to every label under which it exceeds the bar. If too few neurons exceed it, the rest belong to no
    label, as published. Ties are resolved by `torch.topk`, also as published.
    """
    probability = probabilities(active, tokens)
    bar = bar_of(probability, quantile)
    entropy = filtered_entropies(probability, bar)
    lowest = entropy.topk(round(len(entropy) * rate), largest=False)
    return Chosen(lowest.indices, probability[lowest.indices] > bar, lowest.values)
