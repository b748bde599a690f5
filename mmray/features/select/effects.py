"""A second pass over samples: what each of a few hundred candidate neurons does to the nouns of all places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from mmray.features.select.selection import CandidateSums, choose
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_probability
from mmray.models.prompting import Batch
from mmray.neurons.gradients import gradient_pass
from mmray.neurons.scoring import ablation_effects
from mmray.neurons.token_positions import TokenPosition
from mmray.runs.tables import field, vector_column, vectors

EFFECTS = pa.schema(
    [
        field("concept", pa.string()),
        field("log_prob", pa.float32(), "nats, of the noun"),
        field("effects", pa.large_binary(), "fp32 per candidate of any concept: log-odds, to first order"),
        field("scores", pa.large_binary(), "fp32 per candidate: the score `effect`"),
    ]
)
"""A row is a place; what a unit of work of `mmray select` commits."""


class CandidateEffects:
    """Collects the effects of every concept's candidates; neurons are numbered over all layers."""

    def __init__(self, candidates: Mapping[str, Int64[ndarray, " candidate"]]) -> None:
        self.candidates = {concept: torch.as_tensor(neurons) for concept, neurons in candidates.items()}
        self.union = torch.unique(torch.cat([torch.zeros(0, dtype=torch.long), *self.candidates.values()]))
        self.concepts: list[str] = []
        self._effects: list[Float[Tensor, "place candidate"]] = []
        self._scores: list[Float[Tensor, "place candidate"]] = []
        self._log_probabilities: list[Float[Tensor, " place"]] = []

    def add(self, model: LoadedModel, batch: Batch, places: Sequence[TokenPosition]) -> None:
        """Run a batch forward, and backward for each noun."""
        products, captured = gradient_pass(model, batch, places, "effect")
        scores = ablation_effects(model, captured, products)
        log_prob = log_probability(model, captured.hidden, captured.tokens)
        self.keep([place.concept for place in places], products, scores, log_prob)

    def keep(
        self,
        concepts: Sequence[str],
        products: Sequence[Float[Tensor, "place neuron"]],
        scores: Sequence[Float[Tensor, "place neuron"]],
        log_probabilities: Float[Tensor, " place"],
    ) -> None:
        """Keep the candidates' columns of a batch, a list entry a layer: first-order effects, and the score `effect`.

        Effects of a set add up to first order; what each neuron alone does to the final norm's scale does not.
        """
        for kept, given in ((self._effects, products), (self._scores, scores)):
            kept.append(torch.cat([part.cpu() for part in given], dim=1)[:, self.union])
        self._log_probabilities.append(log_probabilities.cpu())
        self.concepts.extend(concepts)

    def table(self) -> pa.Table:
        """Return what was collected: a row per place."""
        if not self.concepts:
            return EFFECTS.empty_table()
        effects, scores = (torch.cat(kept).float().numpy() for kept in (self._effects, self._scores))
        every = np.ones(len(self.concepts), bool)
        columns = {
            "concept": self.concepts,
            "log_prob": torch.cat(self._log_probabilities).float().numpy(),
            "effects": vector_column(effects, every),
            "scores": vector_column(scores, every),
        }
        return pa.table(columns, schema=EFFECTS)

    def take(self, part: pa.Table) -> None:
        """Take in what another has collected for the same candidates."""
        if not len(part):
            return
        for kept, name in ((self._effects, "effects"), (self._scores, "scores")):
            kept.append(torch.from_numpy(np.stack(vectors(part[name], np.float32))))
        self._log_probabilities.append(torch.tensor(part["log_prob"].to_numpy()))
        self.concepts.extend(part["concept"].to_pylist())

    def of(self, concept: str) -> CandidateSums:
        """Return what was collected for a concept's candidates."""
        columns = torch.searchsorted(self.union, self.candidates[concept])
        effects, scores = torch.cat(self._effects)[:, columns], torch.cat(self._scores)[:, columns]
        probability = torch.cat(self._log_probabilities).double().exp().clamp(1e-6, 1 - 1e-6)
        log_odds = torch.logit(probability).float()
        own = torch.tensor([name == concept for name in self.concepts])
        elsewhere = scores[~own].square().mean(dim=0).sqrt().nan_to_num()
        return CandidateSums(effects[own], log_odds[own], effects[~own], log_odds[~own], elsewhere)

    def choose(self, concept: str, count: int) -> list[int]:
        """Return the concept's neurons, chosen together."""
        chosen = choose(self.of(concept), count)
        return [int(neuron) for neuron in self.candidates[concept][chosen.long()]]
