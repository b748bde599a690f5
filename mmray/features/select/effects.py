"""A second pass over samples: the effect of a few hundred candidate neurons on the noun at every position."""

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
"""The part that a unit of work of `mmray select` commits: one row per position of a noun."""


class CandidateEffects:
    """Collects the effects of all concepts' candidates. Neurons are indices over all layers."""

    def __init__(self, candidates: Mapping[str, Int64[ndarray, " candidate"]]) -> None:
        self.candidates = {concept: torch.as_tensor(neurons) for concept, neurons in candidates.items()}
        # A neuron may be a candidate of several concepts; its column is kept once.
        self.union = torch.unique(torch.cat([torch.zeros(0, dtype=torch.long), *self.candidates.values()]))
        self.concepts: list[str] = []
        """The concept of each position so far."""
        self._effects: list[Float[Tensor, "position candidate"]] = []
        self._scores: list[Float[Tensor, "position candidate"]] = []
        self._log_probabilities: list[Float[Tensor, " position"]] = []

    def add(self, model: LoadedModel, batch: Batch, positions: Sequence[TokenPosition]) -> None:
        """Add a batch, run forward, and backward for each noun."""
        products, captured = gradient_pass(model, batch, positions, "effect")
        scores = ablation_effects(model, captured, products)
        log_prob = log_probability(model, captured.hidden, captured.tokens)
        self.add_columns([position.concept for position in positions], products, scores, log_prob)

    def add_columns(
        self,
        concepts: Sequence[str],
        products: Sequence[Float[Tensor, "position neuron"]],
        scores: Sequence[Float[Tensor, "position neuron"]],
        log_probabilities: Float[Tensor, " position"],
    ) -> None:
        """Add the candidates' columns of a batch, given per layer: first-order effects, and the score `effect`.

        Both are needed: first-order effects of a set add up; the score's effect on the final norm's scale does not.
        """
        for kept, given in ((self._effects, products), (self._scores, scores)):
            # Only the candidates' columns: all neurons of all positions would not fit.
            kept.append(torch.cat([part.cpu() for part in given], dim=1)[:, self.union])
        self._log_probabilities.append(log_probabilities.cpu())
        self.concepts.extend(concepts)

    def table(self) -> pa.Table:
        """Return one row per position."""
        if not self.concepts:
            return EFFECTS.empty_table()
        effects, scores = (torch.cat(kept).float().numpy() for kept in (self._effects, self._scores))
        present = np.ones(len(self.concepts), bool)
        columns = {
            "concept": self.concepts,
            "log_prob": torch.cat(self._log_probabilities).float().numpy(),
            "effects": vector_column(effects, present),
            "scores": vector_column(scores, present),
        }
        return pa.table(columns, schema=EFFECTS)

    def add_part(self, part: pa.Table) -> None:
        """Add the table of another instance with the same candidates."""
        if not len(part):
            return
        for kept, name in ((self._effects, "effects"), (self._scores, "scores")):
            kept.append(torch.from_numpy(np.stack(vectors(part[name], np.float32))))
        self._log_probabilities.append(torch.tensor(part["log_prob"].to_numpy()))
        self.concepts.extend(part["concept"].to_pylist())

    def of(self, concept: str) -> CandidateSums:
        """Return the effects of a concept's candidates at its own positions and at those of other nouns."""
        columns = torch.searchsorted(self.union, self.candidates[concept])
        effects, scores = torch.cat(self._effects)[:, columns], torch.cat(self._scores)[:, columns]
        # Clamped, because a probability of 0 or 1 has infinite log-odds.
        probability = torch.cat(self._log_probabilities).double().exp().clamp(1e-6, 1 - 1e-6)
        log_odds = torch.logit(probability).float()
        own = torch.tensor([name == concept for name in self.concepts])
        # Without other nouns the mean is NaN; then nothing counts against a neuron.
        elsewhere = scores[~own].square().mean(dim=0).sqrt().nan_to_num()
        return CandidateSums(effects[own], log_odds[own], effects[~own], log_odds[~own], elsewhere)

    def choose(self, concept: str, count: int) -> list[int]:
        """Return the concept's neurons that are chosen together, the highest weight first."""
        chosen = choose(self.of(concept), count)
        return [int(neuron) for neuron in self.candidates[concept][chosen.long()]]
