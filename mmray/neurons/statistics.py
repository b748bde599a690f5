"""What each neuron does over all tokens: activity by label and modality, and its most extreme samples.

Counted are image tokens and caption tokens; padding, special tokens and the prompt (the same in every sample) are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mmray.models.prompting import Run
from mmray.tables import PART_SCHEMAS

MODALITIES = ("image", "text")
EXAMPLES = 5
"""Highest and lowest samples kept for each neuron."""

Block = tuple[int, int, int, int, str]
"""Rows [first, last) of a batch whose positions [start, stop) hold one modality."""


def blocks(runs: Iterable[Run]) -> list[Block]:
    """Join the runs of neighbouring rows that cover the same positions, so that one operation serves them all."""
    ordered = sorted(runs, key=lambda run: (run.modality, run.start, run.stop, run.row))
    joined: list[Block] = []
    for (modality, start, stop), group in groupby(ordered, key=lambda run: (run.modality, run.start, run.stop)):
        rows = [run.row for run in group]
        first = rows[0]
        for row, following in zip(rows, [*rows[1:], -1], strict=True):
            if following != row + 1:
                joined.append((first, row + 1, start, stop, modality))
                first = following
    return joined


Best = dict[int, tuple[Tensor, Tensor, Tensor]]
"""By sign: activation · sign, sample and position, each [rank, neuron], highest first."""


@dataclass(frozen=True)
class _Batch:
    """An announced batch: membership is 1 where a sample (column) has a label (row); and what was seen of each layer."""

    runs: list[Run]
    blocks: list[Block]
    membership: Float[Tensor, "label sample"]
    seen: list[tuple[int, dict[str, Tensor], Best]] = field(default_factory=list)


class TokenStatistics:
    """Accumulates one shard's statistics of every neuron, on the model's device.

    Labels are (kind, label) pairs; every sample also counts under ("all", "all"). A batch is announced with `begin`,
    seen layer by layer with `add`, and counts once `commit` is called: a forward that fails midway leaves no trace.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        self.widths = widths
        self.device = device
        self.labels: dict[tuple[str, str], int] = {}
        self.tokens: dict[tuple[int, str], int] = {}
        self.sums: dict[tuple[int, str], list[Tensor | None]] = {}
        self.extremes = [_Extremes(width, device) for width in widths]
        self.samples = 0
        self._batch = _Batch([], [], torch.zeros(0, 0))

    def begin(self, labels: Sequence[dict[str, str]], runs: Sequence[Run]) -> None:
        """Announce a batch: the labels of its samples by kind, and where image and caption stand."""
        members = [
            [self.labels.setdefault(pair, len(self.labels)) for pair in (("all", "all"), *kinds.items())]
            for kinds in labels
        ]
        membership = torch.zeros(len(self.labels), len(labels))
        for row, indices in enumerate(members):
            membership[indices, row] = 1
        self._batch = _Batch(list(runs), blocks(runs), membership.to(self.device))

    def add(self, layer: int, activation: Float[Tensor, "row neuron"], opened: Float[Tensor, "row neuron"]) -> None:
        """See one layer of the announced batch: activations, and what is above zero where the neuron is open."""
        batch = self._batch
        rows = batch.membership.shape[1]
        values, gates = activation.unflatten(0, (rows, -1)), opened.unflatten(0, (rows, -1))
        highest = torch.full((rows, self.widths[layer]), -torch.inf, device=values.device)
        lowest = torch.full_like(highest, torch.inf)
        sums: dict[str, Tensor] = {}
        for first, last, start, stop, modality in batch.blocks:
            active, total, squares, high, low = reduce_tokens(values[first:last, start:stop], gates[first:last, start:stop])
            kept = sums.setdefault(modality, torch.zeros(3, *highest.shape, device=values.device))
            kept[:, first:last] += torch.stack([active, total, squares])
            highest[first:last] = torch.maximum(highest[first:last], high)
            lowest[first:last] = torch.minimum(lowest[first:last], low)
        membership = batch.membership.to(values.device)
        by_label = {
            modality: torch.tensordot(membership, numbers, dims=([1], [1])).double()
            for modality, numbers in sums.items()
        }
        better = self.extremes[layer].improved(values, highest, lowest, self.samples, batch.blocks)
        batch.seen.append((layer, by_label, better))

    def commit(self) -> None:
        """Count the announced batch."""
        batch = self._batch
        for layer, by_label, better in batch.seen:
            self.extremes[layer].best = better
            for modality, numbers in by_label.items():
                for label, added in enumerate(numbers):
                    sums = self.sums.setdefault((label, modality), [None] * len(self.widths))
                    before = sums[layer]
                    sums[layer] = added if before is None else before.add_(added)
        for run in batch.runs:
            for label in batch.membership[:, run.row].nonzero()[:, 0].tolist():
                key = (label, run.modality)
                self.tokens[key] = self.tokens.get(key, 0) + run.stop - run.start
        self.samples += batch.membership.shape[1]

    def activity_table(self) -> pa.Table:
        """Return the shard's activity: a row a label and modality, lists over all neurons."""
        names = {index: pair for pair, index in self.labels.items()}
        rows = []
        for label, modality in sorted(self.tokens, key=lambda key: (names[key[0]], key[1])):
            flat = torch.cat([part.cpu() for part in self.sums[label, modality] if part is not None], dim=1).numpy()
            kind, name = names[label]
            rows.append(
                {
                    "label_kind": kind,
                    "label": name,
                    "modality": modality,
                    "n_tokens": self.tokens[label, modality],
                    "n_active": flat[0].astype(np.int64),
                    "sum": flat[1],
                    "sum_squares": flat[2],
                }
            )
        return pa.Table.from_pylist(rows, schema=PART_SCHEMAS["activity"])

    def examples_table(self) -> pa.Table:
        """Return the shard's extreme samples, numbered as they came: a row a sign and rank, lists over all neurons."""
        rows = []
        for sign in (1, -1):
            best = [extremes.best[sign] for extremes in self.extremes]
            for rank in range(min(EXAMPLES, self.samples)):
                values, samples, positions = (
                    torch.cat([layer[part][rank].cpu() for layer in best]).numpy() for part in range(3)
                )
                row = {"sign": sign, "rank": rank + 1, "activation": values * sign}
                rows.append(row | {"sample": samples, "position": positions})
        return pa.Table.from_pylist(rows, schema=PART_SCHEMAS["examples"])


def reduce_tokens(
    part: Float[Tensor, "sample position neuron"], gate: Float[Tensor, "sample position neuron"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return, over positions and in fp32: open tokens, sum, sum of squares, maximum and minimum of each neuron."""
    wide = part.float()
    active = torch.gt(gate, 0, out=torch.empty(gate.shape, device=gate.device)).sum(1)
    return active, wide.sum(1), (wide * wide).sum(1), part.amax(1).float(), part.amin(1).float()


class _Extremes:
    """The EXAMPLES highest samples of each neuron of a layer, and of its negative (the lowest)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.best: Best = {
            sign: (
                torch.full((EXAMPLES, width), -torch.inf, device=device),
                torch.zeros(EXAMPLES, width, dtype=torch.int32, device=device),
                torch.zeros(EXAMPLES, width, dtype=torch.int32, device=device),
            )
            for sign in (1, -1)
        }

    def improved(
        self, values: Float[Tensor, "sample position neuron"], highest: Tensor, lowest: Tensor, first: int, places: list[Block]
    ) -> Best:
        """Return the best with a batch taken in, whose samples are numbered from `first`."""
        result = dict(self.best)
        counted = torch.zeros(values.shape[:2], dtype=torch.bool)
        for start_row, last_row, start, stop, _ in places:
            counted[start_row:last_row, start:stop] = True
        excluded = ~counted.to(values.device)
        for sign, reached in ((1, highest), (-1, -lowest)):
            best, samples, positions = self.best[sign]
            top, rows = reached.topk(min(EXAMPLES, len(reached)), dim=0)
            better = top > best[-1]
            if not better.any():
                continue
            rank, neuron = better.nonzero(as_tuple=True)
            row = rows[rank, neuron]
            along = (values[row, :, neuron].float() * sign).masked_fill(excluded[row], -torch.inf)
            found = torch.zeros_like(rows, dtype=torch.int32)
            found[rank, neuron] = along.argmax(dim=1).int()
            # Earlier samples stand first and the sort is stable: a tie stays with the one seen first.
            joined = torch.cat([best, top.masked_fill(~better, -torch.inf)])
            order = joined.sort(dim=0, descending=True, stable=True).indices[:EXAMPLES]
            joined_samples = torch.cat([samples, rows.int() + first])
            joined_positions = torch.cat([positions, found])
            result[sign] = (joined.gather(0, order), joined_samples.gather(0, order), joined_positions.gather(0, order))
        return result

