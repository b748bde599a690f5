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
from mmray.features.census.overflow import Overflow
from mmray.features.census.tables import PARTS, SUMS
from mmray.features.census.top import top
from mmray.runs.tables import list_column

ALL_KEPT = 16_384
"""Models of at most so many neurons keep all of them, and every rank is certified."""
KEPT_OF_MORE = 2_048
"""Neurons that a shard keeps per concept for larger models."""

SUMS_MEMORY = 384 << 20
"""Bytes of sums that a shard holds in memory; on a GPU at least."""
SUMS_ON_DISK = 8 << 30
"""Bytes of sums of a shard that wait on disk at most: about 1,000 concepts at 352,256 neurons."""
GPU_PART = 20
"""On a GPU a shard's sums take one part in so many of the memory. Two shards are in memory at a time."""
REDUCED = 8
"""Concepts reduced at a time; each takes about 16 bytes per neuron."""


def candidates_kept(candidates: int | None, neurons: int) -> int:
    """Return how many neurons a shard keeps per concept, given `--candidates`."""
    return min(neurons, candidates or (neurons if neurons <= ALL_KEPT else KEPT_OF_MORE))


def sums_memory(device: torch.device) -> int:
    """Return how many bytes of sums a shard holds on a device; beyond that they go to disk, for which a GPU waits."""
    if device.type != "cuda":
        return SUMS_MEMORY
    return max(SUMS_MEMORY, torch.cuda.get_device_properties(device).total_memory // GPU_PART)


class ConceptSums:
    """Accumulates one shard's scores per concept, on the model's device, and keeps the `kept` highest neurons.

    The sums of as many concepts are in memory as fit into so many bytes. When another needs room, those with the fewest
    occurrences to come give theirs up, and of equal ones those that occurred longest ago. A complete one is closed:
    reduced to its row of `concepts`. The sums of others wait on disk for the next occurrence; those that find no room
    there are closed, too. Should a closed one occur again, it makes another row, and the merge adds rows up as if they
    came from two shards. All this depends on the order of occurrences alone, not on batches.
    """

    def __init__(self, widths: Sequence[int], kept: int, memory: int = SUMS_MEMORY, disk: int = SUMS_ON_DISK) -> None:
        self.widths, self.kept = widths, kept
        size = len(SUMS) * 8 * sum(widths)
        self.room, self.room_on_disk = max(1, memory // size), disk // size
        self.expected: Counter[str] = Counter()
        """Occurrences to come of concepts for which they are known."""
        self._rows: dict[str, int] = {}
        """Concepts in memory and their rows of the sums; the last to occur comes last."""
        self._counts: Counter[str] = Counter()
        """Their occurrences so far."""
        self._free: list[int] = []
        self._sums: list[Tensor | None] = [None] * len(widths)
        self._closed: list[pa.Table] = []
        self._overflow = Overflow()
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
                self._make_room()
            row = self._rows.pop(concept, None)
            self._rows[concept] = row if row is not None else self._free.pop() if self._free else len(self._rows)
            if concept in self._overflow.counts:
                self._reopen(concept)
            self._counts[concept] += 1
            if concept in self.expected:
                self.expected[concept] -= 1
        self._add(concepts, scores, activation, slice(start, len(concepts)))

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return the shard's `concepts` and `totals`, once all occurrences are added."""
        totals = self._totals + self._over_rows(None)
        tables = [PARTS["concepts"].empty_table(), *self._closed]
        for part in _parts(sorted(self._rows)):
            tables.append(self._reduced(part, [self._counts[name] for name in part], self._open_sums(part)))
        waiting = sorted(self._overflow.counts)
        for part in _parts(waiting):
            counts, sums = zip(*(self._overflow.take(name, sum(self.widths)) for name in part), strict=True)
            stacked = torch.stack(sums, dim=1)
            totals += stacked[:2].sum(dim=1).numpy()
            tables.append(self._reduced(part, counts, stacked.to(self._device)))
        concepts = pa.concat_tables(tables).combine_chunks()
        # Those of concepts that never left memory are in order already, and to take rows is to copy them all again.
        if self._closed or waiting:
            # Stable, so that rows of one concept stay in the order of its occurrences.
            concepts = concepts.take(pc.sort_indices(concepts["concept"]))
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
        rows = [self._rows[concept] for concept in own]
        # Each concept's first occurrence, then each one's second, and so on: rows of a turn are distinct, so that
        # index_add_ adds in a fixed order on a GPU too. A CPU adds one after another.
        turns, together = _turns(rows), [list(range(len(own)))]
        for layer, (score, active) in enumerate(zip(scores, activation, strict=True)):
            sums = self._with_room(layer, score.device)
            for turn in together if score.device.type == "cpu" else turns:
                places = torch.tensor(turn, device=score.device)
                at = torch.tensor([rows[number] for number in turn], device=score.device)
                wide = score[part][places].double()
                for total, values in zip(sums, (wide, wide.square(), active[part][places].double()), strict=True):
                    total.index_add_(0, at, values)

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

    def _make_room(self) -> None:
        """Make room for a quarter more concepts, in place of those that the shard needs least."""
        # `sorted` is stable: of equal ones the last to occur stays open.
        least = sorted(self._rows, key=lambda concept: max(0, self.expected[concept]))[: -(-self.room // 4)]
        incomplete = [name for name in least if self.expected.get(name, 1) > 0]
        left = max(0, self.room_on_disk - len(self._overflow.counts))
        # If the disk has no room for all, those that the shard needs most wait there.
        waiting = incomplete[max(0, len(incomplete) - left) :]
        closed = [name for name in least if name not in waiting]
        for part in _parts(closed):
            self._closed.append(self._reduced(part, [self._counts[name] for name in part], self._open_sums(part)))
        self._totals += self._over_rows(self._rows_of(closed))
        if waiting:
            self._overflow.put(waiting, [self._counts[name] for name in waiting], self._open_sums(waiting))
        rows = self._rows_of(least)
        for sums in self._sums:
            if sums is not None:
                sums.index_fill_(1, rows.to(sums.device), 0)
        for name in least:
            del self._rows[name], self._counts[name]
        self._free.extend(rows.tolist())

    def _reopen(self, name: str) -> None:
        """Bring the sums of a concept back into memory, into the row that it has been given."""
        self._counts[name], whole = self._overflow.take(name, sum(self.widths))
        for sums, own in zip(self._sums, torch.split(whole, list(self.widths), dim=1), strict=True):
            if sums is not None:
                sums[:, self._rows[name]] = own.to(sums.device)

    @property
    def _device(self) -> torch.device:
        """That of the first layer."""
        return next(sums.device for sums in self._sums if sums is not None)

    def _rows_of(self, names: Sequence[str]) -> Int64[Tensor, " concept"]:
        return torch.tensor([self._rows[name] for name in names], dtype=torch.long)

    def _open_sums(self, names: Sequence[str]) -> Float64[Tensor, "quantity concept neuron"]:
        """Return the sums of concepts in memory over the neurons of all layers, on the first layer's device."""
        rows = self._rows_of(names)
        found = torch.empty(len(SUMS), len(names), sum(self.widths), dtype=torch.float64, device=self._device)
        # Into one tensor: a copy of each layer first would read and write the sums once more.
        for sums, own in zip(self._sums, torch.split(found, list(self.widths), dim=2), strict=True):
            if sums is not None:
                for number, row in enumerate(rows.tolist()):
                    own[:, number] = sums[:, row]
        return found

    @phase("candidates")
    @torch.inference_mode()
    def _reduced(
        self, names: Sequence[str], counts: Sequence[int], sums: Float64[Tensor, "quantity concept neuron"]
    ) -> pa.Table:
        """Return the rows of `concepts` of these concepts."""
        schema, n, scores = PARTS["concepts"], np.array(counts, np.int64), sums[0]
        # Infinite where nothing is left out: no sum reaches the bound or falls below the floor.
        bounds, floors = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        index, neurons = pa.nulls(len(names), schema.field("neuron").type), None
        if self.kept < scores.shape[1]:
            neurons, bound = highest(scores, self.kept)
            bounds, floors = bound.cpu().numpy(), scores.amin(1).cpu().numpy()
            index = list_column(neurons.cpu().numpy(), schema.field("neuron").type)
        columns = []
        for name, quantity in zip(SUMS, sums, strict=True):
            # For a single occurrence the sum of squares is the square of the sum, so it is not written. Many concepts
            # of a shard occur once. True is 1: the squares need more than one occurrence, other sums more than none.
            present = n > (name == "score_squares")
            own = quantity if neurons is None else quantity.gather(1, neurons)
            written = own[torch.from_numpy(present).to(own.device)]
            columns.append(list_column(written.cpu().numpy(), schema.field(name).type, present))
        scalars = [pa.array(names, pa.string()), pa.array(n), pa.array(bounds), pa.array(floors)]
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


def _turns(keys: Sequence[int]) -> list[list[int]]:
    """Return the places of each key's first occurrence, those of each one's second, and so on."""
    seen, turns = Counter[int](), list[list[int]]()
    for place, key in enumerate(keys):
        if seen[key] == len(turns):
            turns.append([])
        turns[seen[key]].append(place)
        seen[key] += 1
    return turns


def _parts(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[at : at + REDUCED] for at in range(0, len(names), REDUCED)]


def highest(
    scores: Float64[Tensor, "concept neuron"], kept: int
) -> tuple[Int64[Tensor, "concept kept"], Float64[Tensor, " concept"]]:
    """Return each concept's `kept` highest neurons in order of index, and the highest score of the others.

    Of equal scores that of the lower index counts, as in a stable sort, whose result this is on every device. Fewer
    than all neurons must be kept.
    """
    values, index = top(scores, kept + 1)
    neurons, bound = index[:, :kept], values[:, kept]
    # `top` gives equal scores in any order. It matters only where one was left out.
    tied = values[:, kept - 1] == bound
    if tied.any():
        neurons[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return neurons.sort(dim=1).values, bound
