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

from mmray.models.prompting import TokenSpan
from mmray.neurons.tables import STATISTICS

MODALITIES = ("image", "text")
NO_IMAGE = torch.iinfo(torch.int64).min
"""Number of no sample's image."""
CACHED, COPIED = 2**18, 2**26
"""Numbers that are reduced at a time: 1 MB a thread on a processor, 256 MB on a GPU."""
EXAMPLES = 5
"""Highest and lowest samples kept for each neuron, each of another image."""


@dataclass(frozen=True)
class Best:
    """Extreme samples by rank; the columns are the neurons' highest activations, then their lowest, negated."""

    activation: Float[Tensor, "rank side"]
    sample: Int[Tensor, "rank side"]
    position: Int[Tensor, "rank side"]


@dataclass(frozen=True)
class Span:
    """The positions `[start, stop)` among which all samples of a batch have their tokens of one modality."""

    start: int
    stop: int
    mask: Float[Tensor, "sample 1 position"]
    """1 where the position holds such a token."""
    outside: Float[Tensor, "sample position 1"] | None
    """-inf where it does not; None where every sample has them throughout."""

    def to(self, device: torch.device) -> Span:
        """Return the span with its tensors on the device."""
        outside = None if self.outside is None else self.outside.to(device)
        return Span(self.start, self.stop, self.mask.to(device), outside)


@dataclass(frozen=True)
class _Batch:
    """An announced batch: membership is 1 where a sample (column) has a label (row); what was seen of each layer."""

    runs: list[TokenSpan]
    membership: Float[Tensor, "label sample"]
    spans: list[Span]
    images: Int[Tensor, " sample"]
    """Number of the image of each sample of the shard so far, the batch's own last."""
    seen: list[tuple[int, Float64[Tensor, "modality quantity label neuron"], Int[Tensor, " side"], Best]] = field(
        default_factory=list
    )
    unsound: list[Int[Tensor, " sample"]] = field(default_factory=list)
    """Of each layer, the neurons whose sums over a sample's tokens are not finite."""
    moved: dict[torch.device, tuple[Tensor, list[Span], Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Float[Tensor, "label sample"], list[Span], Int[Tensor, " sample"]]:
        """Return membership, spans and images on a device, moved once: the layers of a model may lie on several."""
        if device not in self.moved:
            spans = [span.to(device) for span in self.spans]
            self.moved[device] = self.membership.to(device), spans, self.images.to(device)
        return self.moved[device]


class TokenStatistics:
    """Accumulates one shard's statistics of every neuron, each layer's on the device that computes it.

    Labels are (kind, label) pairs; every sample also counts under ("all", "all"). A batch is announced with `begin`,
    seen layer by layer with `add`, and counts once `commit` is called: a forward that fails midway leaves no trace.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = widths
        self.labels: dict[tuple[str, str], int] = {}
        self.tokens: dict[tuple[int, str], int] = {}
        self.sums: dict[tuple[int, str], list[Tensor | None]] = {}
        self.extremes: dict[int, _Extremes] = {}
        self.images: list[int] = []
        self._numbers: dict[str, int] = {}
        self._batch = _Batch([], torch.zeros(0, 0), [], torch.zeros(0))

    @property
    def samples(self) -> int:
        """Samples counted so far."""
        return len(self.images)

    def begin(
        self, labels: Sequence[dict[str, str]], runs: Sequence[TokenSpan], images: Sequence[str | None] | None = None
    ) -> None:
        """Announce a batch: the labels of its samples by kind, where image and caption stand, and its images by digest.

        A sample without a digest is taken for an image of its own.
        """
        members = [
            [self.labels.setdefault(pair, len(self.labels)) for pair in (("all", "all"), *kinds.items())]
            for kinds in labels
        ]
        membership = torch.zeros(len(self.labels), len(labels))
        for row, indices in enumerate(members):
            membership[indices, row] = 1
        numbers = self.images + [
            # Below zero, where no digest's number is.
            self._numbers.setdefault(image, len(self._numbers)) if image is not None else -1 - number
            for number, image in enumerate(images or [None] * len(labels), self.samples)
        ]
        self._batch = _Batch(list(runs), membership, token_spans(runs, len(labels)), torch.tensor(numbers))

    @torch.inference_mode()
    def add(self, layer: int, activation: Float[Tensor, "row neuron"], opened: Float[Tensor, "row neuron"]) -> None:
        """See one layer of the announced batch: activations, and what is above zero where the neuron is open."""
        batch = self._batch
        rows = batch.membership.shape[1]
        values, gates = (part.reshape(rows, -1, part.shape[-1]) for part in (activation, opened))
        membership, spans, images = batch.on(values.device)
        by_sample, reached = reduce_tokens(values, gates, spans)
        # What is not finite, or overflows when squared in fp32, is not finite squared.
        batch.unsound.append((~by_sample[:, 2].sum(0).isfinite()).sum(1))
        by_label = (membership @ by_sample).double()
        if layer not in self.extremes:
            self.extremes[layer] = _Extremes(self.widths[layer], values.device)
        batch.seen.append((layer, by_label, *self.extremes[layer].improved(values, reached, spans, images)))

    def unsound(self) -> list[int]:
        """Return of each sample of the announced batch how many neurons have sums that are not finite."""
        return torch.stack([part.cpu() for part in self._batch.unsound]).sum(0).tolist()

    @torch.inference_mode()
    def commit(self) -> None:
        """Count the announced batch."""
        batch = self._batch
        for layer, by_label, sides, better in batch.seen:
            self.extremes[layer].replace(sides, better)
            for modality, numbers in zip(MODALITIES, by_label, strict=True):
                for label, added in enumerate(numbers.unbind(1)):
                    sums = self.sums.setdefault((label, modality), [None] * len(self.widths))
                    before = sums[layer]
                    sums[layer] = added if before is None else before.add_(added)
        for run in batch.runs:
            for label in batch.membership[:, run.row].nonzero()[:, 0].tolist():
                key = (label, run.modality)
                self.tokens[key] = self.tokens.get(key, 0) + run.stop - run.start
        self.images = batch.images.tolist()

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
        return pa.Table.from_pylist(rows, schema=STATISTICS["activity"])

    def examples_table(self) -> pa.Table:
        """Return the shard's extreme samples, numbered as they came: a row a sign and rank, lists over all neurons."""
        rows = []
        for sign in (1, -1):
            for rank in range(min(EXAMPLES, len(set(self.images)))):
                parts = [
                    [part[rank].cpu() for part in _side(self.extremes[layer].best, sign)]
                    for layer in range(len(self.widths))
                ]
                values, samples, positions = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
                row = {"sign": sign, "rank": rank + 1, "activation": values * sign}
                rows.append(row | {"sample": samples, "position": positions})
        return pa.Table.from_pylist(rows, schema=STATISTICS["examples"])


def token_spans(runs: Iterable[TokenSpan], rows: int) -> list[Span]:
    """Return the span of each of MODALITIES; an empty one where the batch has none of it."""
    spans = []
    by_modality: dict[str, list[TokenSpan]] = {modality: [] for modality in MODALITIES}
    for run in runs:
        by_modality[run.modality].append(run)
    for found in by_modality.values():
        start = min((run.start for run in found), default=0)
        stop = max((run.stop for run in found), default=0)
        mask = torch.zeros(rows, stop - start)
        for run in found:
            mask[run.row, run.start - start : run.stop - start] = 1
        outside = None if mask.all() else torch.where(mask > 0, 0.0, -torch.inf)[:, :, None]
        spans.append(Span(start, stop, mask[:, None], outside))
    return spans


def reduce_tokens(
    values: Float[Tensor, "sample position neuron"],
    gates: Float[Tensor, "sample position neuron"],
    spans: Sequence[Span],
) -> tuple[Float[Tensor, "modality 3 sample neuron"], Float[Tensor, "modality sample side"]]:
    """Return, in fp32 and over the spans' tokens: (open tokens, sum, sum of squares); the maximum, the negated minimum.

    A few samples are reduced at a time: a whole layer does not fit a processor's cache, nor a copy of it for the
    squares a GPU that is nearly full. Sums are products with the mask.
    """
    rows, _, width = values.shape
    sums = values.new_zeros(len(spans), 3, rows, 1, width, dtype=torch.float32)
    reached = values.new_full((len(spans), rows, 2 * width), -torch.inf, dtype=torch.float32)
    together = (CACHED * torch.get_num_threads() if values.device.type == "cpu" else COPIED) // width
    for span, (opened, total, squares), extremes in zip(spans, sums, reached, strict=True):
        length = span.stop - span.start
        step = max(1, together // max(1, length))
        room = values.new_empty(min(step, rows), length, width, dtype=torch.float32)
        for first in range(0, rows if length else 0, step):
            some = slice(first, first + step)
            wide, mask = values[some, span.start : span.stop].float(), span.mask[some]
            scratch = room[: len(wide)]
            torch.bmm(mask, wide, out=total[some])
            above = below = wide
            if span.outside is not None:
                above, below = wide + span.outside[some], torch.sub(wide, span.outside[some], out=scratch)
            torch.amax(above, 1, out=extremes[some, :width])
            torch.neg(torch.amin(below, 1), out=extremes[some, width:])
            torch.bmm(mask, torch.mul(wide, wide, out=scratch), out=squares[some])
            torch.bmm(mask, torch.gt(gates[some, span.start : span.stop], 0, out=scratch), out=opened[some])
    return sums[:, :, :, 0], reached


class _Extremes:
    """The EXAMPLES highest and lowest samples of each neuron of a layer."""

    def __init__(self, width: int, device: torch.device) -> None:
        nothing = torch.full((EXAMPLES, 2 * width), -torch.inf, device=device)
        none = torch.zeros(nothing.shape, dtype=torch.int32, device=device)
        self.best = Best(nothing, none, none.clone())

    def improved(
        self,
        values: Float[Tensor, "sample position neuron"],
        reached: Float[Tensor, "modality sample side"],
        spans: Sequence[Span],
        images: Int[Tensor, " sample"],
    ) -> tuple[Int[Tensor, " side"], Best]:
        """Return the sides of neurons that a batch improves, and their best samples, each of another image.

        `images` has the image of each sample of the shard so far; the batch's own are the last.
        """
        highest, width = reached.amax(0), values.shape[2]
        first = len(images) - len(highest)
        sides = (highest.amax(0) > self.best.activation[-1]).nonzero()[:, 0]
        held, sample, position = (
            part.index_select(1, sides) for part in (self.best.activation, self.best.sample, self.best.position)
        )
        candidates = torch.cat([held, highest.index_select(1, sides)])
        pictured = torch.cat([images[sample], images[first:, None].expand(-1, len(sides))])
        activation, index = _highest_of_images(candidates, pictured.masked_fill_(candidates == -torch.inf, NO_IMAGE))
        kept = index.clamp(max=EXAMPLES - 1)
        sample, position = sample.gather(0, kept), position.gather(0, kept)
        ranks = index.new_full((EXAMPLES + len(highest), len(sides)), -1)
        ranks.scatter_(0, index, torch.arange(EXAMPLES, device=index.device)[:, None].expand_as(index))
        # Sample by sample, what is read below stays in the processor's cache.
        row, place = (ranks[EXAMPLES:] >= 0).nonzero(as_tuple=True)
        rank = ranks[EXAMPLES + row, place]
        sample[rank, place] = (row + first).int()
        for span, extremes in zip(spans, reached, strict=True):
            here = (extremes[row, sides[place]] == activation[rank, place]).nonzero()[:, 0]
            if len(here):
                side = sides[place[here]]
                along = values[:, span.start : span.stop][row[here], :, side % width].float()
                along *= 1.0 - 2.0 * (side >= width)[:, None]
                if span.outside is not None:
                    along += span.outside[row[here], :, 0]
                position[rank[here], place[here]] = (span.start + along.argmax(dim=1)).int()
        return sides, Best(activation, sample, position)

    def replace(self, sides: Int[Tensor, " side"], better: Best) -> None:
        """Take the best of these sides for those so far."""
        self.best.activation[:, sides] = better.activation
        self.best.sample[:, sides] = better.sample
        self.best.position[:, sides] = better.position


def _highest_of_images(
    candidates: Float[Tensor, "candidate side"], images: Int[Tensor, "candidate side"]
) -> tuple[Float[Tensor, "rank side"], Int[Tensor, "rank side"]]:
    """Return the EXAMPLES highest of different images and their indices; of equal ones the first. -inf fills up."""
    found = []
    for _ in range(EXAMPLES):
        highest = candidates.max(dim=0)
        found.append(highest)
        candidates = candidates.masked_fill(images == images.gather(0, highest.indices[None]), -torch.inf)
    return torch.stack([best.values for best in found]), torch.stack([best.indices for best in found])


def _side(best: Best, sign: int) -> list[Tensor]:
    return [part.chunk(2, dim=1)[0 if sign > 0 else 1] for part in (best.activation, best.sample, best.position)]
