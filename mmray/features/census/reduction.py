"""Sums of scores per concept in one shard; `concept_merge` adds them up over shards, with a certified top-k.

With 350,000 neurons a dense table of concepts × neurons does not fit in memory. So each shard keeps, per concept, the
neurons with the highest sums, and the largest sum that it left out as a bound. All sums are fp64 sums of fp32 scores in
a fixed order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from mmray.engine.clock import phase
from mmray.features.census.tables import PARTS
from mmray.runs.tables import list_column

ALL_KEPT = 16_384
"""Models of at most so many neurons keep all of them, and every rank is certified."""
KEPT_OF_MORE = 2_048
"""Neurons that a shard keeps per concept for larger models."""

SUMS: dict[str, type[np.float64 | np.float32]] = {
    "score": np.float64,
    "score_squares": np.float64,
    "activation": np.float32,
}
"""Columns of sums over a concept's occurrences, in order of accumulation, with their type in a committed part."""

SUMS_MEMORY = 384 << 20
"""Bytes of sums held at once. Constant, because what a shard commits must not depend on the machine's memory."""
REDUCED = 8
"""Concepts reduced at a time; each takes about 16 bytes per neuron."""


def candidates_kept(candidates: int | None, neurons: int) -> int:
    """Return how many neurons a shard keeps per concept, given `--candidates`."""
    return min(neurons, candidates or (neurons if neurons <= ALL_KEPT else KEPT_OF_MORE))


class ConceptSums:
    """Accumulates one shard's scores per concept, on the model's device, and keeps the `kept` highest neurons.

    At most `room` concepts are open. When another needs room, those that are complete are closed: reduced to a row of
    `concepts`. If too few are complete, so are those with the fewest occurrences to come, and then those that occurred
    longest ago. Later occurrences of a closed concept make another row, and the merge adds rows up as if they came from
    two shards. All this depends on the order of occurrences alone, not on batches.
    """

    def __init__(self, widths: Sequence[int], kept: int) -> None:
        self.widths, self.kept = widths, kept
        self.room = max(1, SUMS_MEMORY // (len(SUMS) * 8 * sum(widths)))
        self.expected: Counter[str] = Counter()
        """Occurrences to come, where they are known."""
        self._rows: dict[str, int] = {}
        """Open concepts and their rows of the sums; the last to occur comes last."""
        self._counts: Counter[str] = Counter()
        self._free: list[int] = []
        self._sums: list[Tensor | None] = [None] * len(widths)
        self._closed: list[pa.Table] = []
        self._totals = np.zeros((2, sum(widths)))
        """Sums of scores and squares over closed concepts."""
        self._n = 0

    @torch.inference_mode()
    def add(
        self,
        concepts: Sequence[str],
        scores: Sequence[Float[Tensor, "occurrence neuron"]],
        activation: Sequence[Float[Tensor, "occurrence neuron"]],
    ) -> None:
        """Add occurrences, given the concept of each, and one tensor per layer."""
        start = 0
        for occurrence, concept in enumerate(concepts):
            if concept not in self._rows and len(self._rows) == self.room:
                self._add(concepts, scores, activation, slice(start, occurrence))
                start = occurrence
                self._close(self._least_needed())
            row = self._rows.pop(concept, None)
            self._rows[concept] = row if row is not None else self._free.pop() if self._free else len(self._rows)
            self._counts[concept] += 1
            self.expected[concept] -= 1
        self._add(concepts, scores, activation, slice(start, len(concepts)))

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return the shard's `concepts` and `totals`, once all occurrences are added."""
        open_concepts = sorted(self._rows)
        opened = [self._reduced(open_concepts[at : at + REDUCED]) for at in range(0, len(open_concepts), REDUCED)]
        concepts = pa.concat_tables([PARTS["concepts"].empty_table(), *self._closed, *opened])
        if self._closed:
            # Stable, so that rows of one concept stay in the order of its occurrences.
            concepts = concepts.take(pc.sort_indices(concepts["concept"]))
        totals = self._totals + self._over_rows(None)
        columns = [list_column(total[None], PARTS["totals"].field("score").type) for total in totals]
        return concepts, pa.Table.from_arrays([pa.array([self._n]), *columns], schema=PARTS["totals"])

    def _add(
        self,
        concepts: Sequence[str],
        scores: Sequence[Float[Tensor, "occurrence neuron"]],
        activation: Sequence[Float[Tensor, "occurrence neuron"]],
        part: slice,
    ) -> None:
        own = concepts[part]
        if not own:
            return
        self._n += len(own)
        in_part = {concept: number for number, concept in enumerate(dict.fromkeys(own))}
        # A product with a 0/1 matrix adds in a fixed order; atomic additions on a GPU would not. Rows are distinct, so
        # index_add_ adds once to each.
        one_hot = torch.zeros(len(in_part), len(own), dtype=torch.float64)
        one_hot[[in_part[concept] for concept in own], range(len(own))] = 1
        rows = torch.tensor([self._rows[concept] for concept in in_part], dtype=torch.long)
        for layer, (score, active) in enumerate(zip(scores, activation, strict=True)):
            sums, wide = self._with_room(layer, score.device), score[part].double()
            on_device, at = one_hot.to(score.device), rows.to(score.device)
            for total, values in zip(sums, (wide, wide.square(), active[part].double()), strict=True):
                total.index_add_(0, at, on_device @ values)

    def _with_room(self, layer: int, device: torch.device) -> Float64[Tensor, "quantity concept neuron"]:
        """Return a layer's sums, with a row for each open concept."""
        sums, needed = self._sums[layer], len(self._rows)
        if sums is None or sums.shape[1] < needed:
            # Doubled, so that growing costs a constant amount per concept.
            rows = min(self.room, max(64, 2 * needed))
            grown = torch.zeros(len(SUMS), rows, self.widths[layer], dtype=torch.float64, device=device)
            if sums is not None:
                grown[:, : sums.shape[1]] = sums
            self._sums[layer] = sums = grown
        return sums

    def _least_needed(self) -> list[str]:
        """Return a quarter of the open concepts: those to close, because the shard needs them least."""
        # `sorted` is stable: of equal ones the last to occur stays open.
        return sorted(self._rows, key=lambda concept: max(0, self.expected[concept]))[: -(-self.room // 4)]

    def _close(self, concepts: Sequence[str]) -> None:
        for at in range(0, len(concepts), REDUCED):
            self._closed.append(self._reduced(concepts[at : at + REDUCED]))
        rows = torch.tensor([self._rows.pop(concept) for concept in concepts], dtype=torch.long)
        self._totals += self._over_rows(rows)
        for sums in self._sums:
            if sums is not None:
                sums.index_fill_(1, rows.to(sums.device), 0)
        for concept in concepts:
            del self._counts[concept]
        self._free.extend(rows.tolist())

    @phase("candidates")
    @torch.inference_mode()
    def _reduced(self, names: Sequence[str]) -> pa.Table:
        """Return the rows of `concepts` of open concepts."""
        schema, counts = PARTS["concepts"], np.array([self._counts[name] for name in names], np.int64)
        rows = torch.tensor([self._rows[name] for name in names], dtype=torch.long)
        scores = self._summed(0, rows)
        # Infinite where nothing is left out: no sum reaches the bound or falls below the floor.
        bounds, floors = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        index, neurons = pa.nulls(len(names), schema.field("neuron").type), None
        if self.kept < scores.shape[1]:
            neurons, bound = highest(scores, self.kept)
            bounds, floors = bound.cpu().numpy(), scores.amin(1).cpu().numpy()
            index = list_column(neurons.cpu().numpy(), schema.field("neuron").type)
        columns = []
        for number, name in enumerate(SUMS):
            # For a single occurrence the sum of squares is the square of the sum, so it is not written. Many concepts
            # of a shard occur once. True is 1: the squares need more than one occurrence, other sums more than none.
            present = counts > (name == "score_squares")
            own = torch.from_numpy(present)
            sums = scores if name == "score" else self._summed(number, rows[own])
            if neurons is not None:
                sums = sums.gather(1, neurons[own.to(neurons.device)])
            columns.append(list_column(sums.cpu().numpy(), schema.field(name).type, present))
        scalars = [pa.array(names, pa.string()), pa.array(counts), pa.array(bounds), pa.array(floors)]
        return pa.Table.from_arrays([*scalars, index, *columns], schema=schema)

    def _over_rows(self, rows: Int64[Tensor, " concept"] | None) -> Float64[ndarray, "2 neuron"]:
        """Return the sums of scores and of squares over these rows, or over all."""
        parts = [
            np.zeros((2, width))
            if sums is None
            else (sums[:2] if rows is None else sums[:2, rows.to(sums.device)]).sum(dim=1).cpu().numpy()
            for sums, width in zip(self._sums, self.widths, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def _summed(self, quantity: int, rows: Int64[Tensor, " concept"]) -> Float64[Tensor, "concept neuron"]:
        """Return one of SUMS for these rows and the neurons of all layers, on the first layer's device."""
        found = [sums[quantity].index_select(0, rows.to(sums.device)) for sums in self._sums if sums is not None]
        return torch.cat([part.to(found[0].device) for part in found], dim=1)


def highest(
    scores: Float64[Tensor, "concept neuron"], kept: int
) -> tuple[Int64[Tensor, "concept kept"], Float64[Tensor, " concept"]]:
    """Return each concept's `kept` highest neurons in order of index, and the highest score of the others.

    Of equal scores that of the lower index counts, as in a stable sort, whose result this is on every device. Fewer
    than all neurons must be kept.
    """
    top = scores.topk(kept + 1, dim=1)
    neurons, bound = top.indices[:, :kept], top.values[:, kept]
    # `topk` gives equal scores in any order. It matters only where one was left out.
    tied = top.values[:, kept - 1] == bound
    if tied.any():
        neurons[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return neurons.sort(dim=1).values, bound
