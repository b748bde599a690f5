"""What each neuron does over all tokens: activity by label and modality, and its most extreme samples.

Counted are image tokens and caption tokens; padding, special tokens and the prompt (the same in every sample) are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mmray.models.prompting import Run
from mmray.tables import PART_SCHEMAS

MODALITIES = ("image", "text")
CACHED, COPIED = 2**19, 2**26
"""Numbers that are reduced at a time: 2 MB on a processor, 256 MB on a GPU."""
EXAMPLES = 5
"""Highest and lowest samples kept for each neuron."""


@dataclass(frozen=True)
class Best:
    """Extreme samples by rank; the columns are the neurons' highest activations, then their lowest, negated."""

    activation: Float[Tensor, "rank side"]
    sample: Int[Tensor, "rank side"]
    position: Int[Tensor, "rank side"]


@dataclass(frozen=True)
class _Batch:
    """An announced batch: membership is 1 where a sample (column) has a label (row); what was seen of each layer."""

    runs: list[Run]
    membership: Float[Tensor, "label sample"]
    seen: list[tuple[int, Float64[Tensor, "modality label quantity neuron"], Best]] = field(default_factory=list)


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
        self._batch = _Batch([], torch.zeros(0, 0))

    def begin(self, labels: Sequence[dict[str, str]], runs: Sequence[Run]) -> None:
        """Announce a batch: the labels of its samples by kind, and where image and caption stand."""
        members = [
            [self.labels.setdefault(pair, len(self.labels)) for pair in (("all", "all"), *kinds.items())]
            for kinds in labels
        ]
        membership = torch.zeros(len(self.labels), len(labels))
        for row, indices in enumerate(members):
            membership[indices, row] = 1
        self._batch = _Batch(list(runs), membership.to(self.device))

    @torch.inference_mode()
    def add(self, layer: int, activation: Float[Tensor, "row neuron"], opened: Float[Tensor, "row neuron"]) -> None:
        """See one layer of the announced batch: activations, and what is above zero where the neuron is open."""
        batch = self._batch
        rows = batch.membership.shape[1]
        values, gates = (part.reshape(rows, -1, part.shape[-1]) for part in (activation, opened))
        masks = token_masks(batch.runs, *values.shape[:2]).to(values.device)
        by_sample, highest, lowest = reduce_tokens(values, gates, masks)
        by_label = torch.einsum("ls,msqn->mlqn", batch.membership.to(values.device), by_sample).double()
        better = self.extremes[layer].improved(values, highest, lowest, self.samples, masks)
        batch.seen.append((layer, by_label, better))

    @torch.inference_mode()
    def commit(self) -> None:
        """Count the announced batch."""
        batch = self._batch
        for layer, by_label, better in batch.seen:
            self.extremes[layer].best = better
            for modality, numbers in zip(MODALITIES, by_label, strict=True):
                for label, added in enumerate(numbers):
                    sums = self.sums.setdefault((label, modality), [None] * len(self.widths))
                    before = sums[layer]
                    sums[layer] = added if before is None else before.add_(added)
        for run in batch.runs:
            for label in batch.membership[:, run.row].nonzero()[:, 0].tolist():
                key = (label, run.modality)
                self.tokens[key] = self.tokens.get(key, 0) + run.stop - run.start
        self.samples += batch.membership.shape[1]

    def activity_table(self, module: str = "language") -> pa.Table:
        """Return the shard's activity: a row a label and modality, lists over all neurons of the module."""
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
                    "module": module,
                }
            )
        return pa.Table.from_pylist(rows, schema=PART_SCHEMAS["activity"])

    def examples_table(self) -> pa.Table:
        """Return the shard's extreme samples, numbered as they came: a row a sign and rank, lists over all neurons."""
        rows = []
        for sign in (1, -1):
            for rank in range(min(EXAMPLES, self.samples)):
                parts = [[part[rank] for part in _side(extremes.best, sign)] for extremes in self.extremes]
                values, samples, positions = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
                row = {"sign": sign, "rank": rank + 1, "activation": values * sign}
                rows.append(row | {"sample": samples, "position": positions})
        return pa.Table.from_pylist(rows, schema=PART_SCHEMAS["examples"])


def token_masks(runs: Iterable[Run], rows: int, positions: int) -> Float[Tensor, "sample modality position"]:
    """Return 1 where a position holds a token of the modality."""
    masks = torch.zeros(rows, len(MODALITIES), positions)
    for run in runs:
        masks[run.row, MODALITIES.index(run.modality), run.start : run.stop] = 1
    return masks


def reduce_tokens(
    values: Float[Tensor, "sample position neuron"],
    gates: Float[Tensor, "sample position neuron"],
    masks: Float[Tensor, "sample modality position"],
) -> tuple[Float[Tensor, "modality sample 3 neuron"], Float[Tensor, "sample neuron"], Float[Tensor, "sample neuron"]]:
    """Return, in fp32 and over the masked positions: (open tokens, sum, sum of squares), maximum and minimum.

    Products with the mask add both modalities in one reading. A few samples are reduced at a time: a whole layer does
    not fit a processor's cache, nor a copy of it for the squares a GPU that is nearly full.
    """
    rows, positions, width = values.shape
    step = max(1, (CACHED if values.device.type == "cpu" else COPIED) // (positions * width))
    sums = values.new_empty(3, rows, len(MODALITIES), width, dtype=torch.float32)
    highest, lowest = values.new_empty(2, rows, width, dtype=torch.float32)
    scratch = values.new_empty(min(step, rows), positions, width, dtype=torch.float32)
    penalty = torch.where(masks.sum(1) > 0, 0.0, -torch.inf)[:, :, None]
    for first in range(0, rows, step):
        some = slice(first, first + step)
        wide, mask, outside = values[some].float(), masks[some], penalty[some]
        room = scratch[: len(wide)]
        torch.bmm(mask, torch.gt(gates[some], 0, out=room), out=sums[0, some])
        torch.bmm(mask, wide, out=sums[1, some])
        torch.bmm(mask, torch.mul(wide, wide, out=room), out=sums[2, some])
        torch.amax(torch.add(wide, outside, out=room), 1, out=highest[some])
        torch.amin(torch.sub(wide, outside, out=room), 1, out=lowest[some])
    return sums.permute(2, 1, 0, 3), highest, lowest


class _Extremes:
    """The EXAMPLES highest and lowest samples of each neuron of a layer."""

    def __init__(self, width: int, device: torch.device) -> None:
        nothing = torch.full((EXAMPLES, 2 * width), -torch.inf, device=device)
        none = torch.zeros(nothing.shape, dtype=torch.int32, device=device)
        self.best = Best(nothing, none, none.clone())

    def improved(
        self,
        values: Float[Tensor, "sample position neuron"],
        highest: Float[Tensor, "sample neuron"],
        lowest: Float[Tensor, "sample neuron"],
        first: int,
        masks: Float[Tensor, "sample modality position"],
    ) -> Best:
        """Return the best with a batch taken in, whose samples are numbered from `first`."""
        width = highest.shape[1]
        reached = torch.cat([highest, -lowest], dim=1)
        activation, index = torch.cat([self.best.activation, reached]).topk(EXAMPLES, dim=0)
        rank, side = (index >= EXAMPLES).nonzero(as_tuple=True)
        row = index[rank, side] - EXAMPLES
        excluded = masks.sum(1) == 0
        kept = index.clamp(max=EXAMPLES - 1)
        sample, position = self.best.sample.gather(0, kept), self.best.position.gather(0, kept)
        sign = 1.0 - 2.0 * (side >= width)
        along = values[row, :, side % width].float() * sign[:, None]
        sample[rank, side] = (row + first).int()
        position[rank, side] = along.masked_fill_(excluded[row], -torch.inf).argmax(dim=1).int()
        return Best(activation, sample, position)


def _side(best: Best, sign: int) -> list[Tensor]:
    return [part.chunk(2, dim=1)[0 if sign > 0 else 1] for part in (best.activation, best.sample, best.position)]
