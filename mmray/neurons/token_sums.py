"""Reduce the values of a batch's tokens per sample, neuron and modality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.models.prompting import Path, TokenSpan, row_count

MODALITIES = ("image", "text")
CACHED, COPIED = 2**17, 2**26
"""Values reduced at a time: 0.5 MB per thread on a CPU, which its cache holds twice; 256 MB on a GPU."""
READ, READ_ON_GPU = 2**20, 2**24
"""Values of single tokens read at a time: each takes about 24 bytes."""
BLOCK = 16
"""Positions reduced at a time on a CPU. With more, values of a wide layer would be read from memory at each pass."""


@dataclass(frozen=True)
class Span:
    """Positions `[start, stop)` that contain tokens of one modality, of some or all samples of a batch."""

    modality: int
    """Index in MODALITIES."""
    start: int
    stop: int
    mask: Float[Tensor, "sample 1 position"]
    """1 where the position holds such a token."""
    outside: Float[Tensor, "sample position 1"] | None
    """-inf where it does not, else 0; None if extremes over all positions are those of the tokens."""
    samples: Int[Tensor, " sample"] | None = None
    """Their numbers in the batch; None: all samples."""
    rows: Int[Tensor, " sample"] | None = None
    """Their rows; None: one each, in order."""
    columns: Int[Tensor, "sample position"] | None = None
    """Places of the positions in the row; None: the positions themselves.

    A position without a token has the place of the sample's first, which changes no extreme.
    """

    def on(self, device: torch.device) -> list[Span]:
        """Return the span with its tensors on the device, on a CPU in blocks of positions."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        span = replace(self, **moved)
        if device.type != "cpu":
            return [span]
        return [span._block(start) for start in range(self.start, self.stop, BLOCK)] or [span]

    def _block(self, start: int) -> Span:
        stop = min(start + BLOCK, self.stop)
        part = slice(start - self.start, stop - self.start)
        mask, columns = self.mask[:, :, part], self.columns
        if columns is not None:
            columns = _without_gaps(columns[:, part], mask)
        return replace(
            self, start=start, stop=stop, mask=mask, outside=_outside(mask, gaps=columns is None), columns=columns
        )

    def read(self, values: Float[Tensor, "row place neuron"], part: slice) -> Float[Tensor, "sample position neuron"]:
        """Return the values of some of the samples; a view where rows are read as they are."""
        if self.columns is not None and self.rows is not None:
            return values[self.rows[part, None], self.columns[part]]
        return values[part if self.rows is None else self.rows[part], self.start : self.stop]


@dataclass(frozen=True)
class Places:
    """Where the samples' tokens of each span are."""

    starts: Int[Tensor, " span"]
    rows: Int[Tensor, "span sample"]
    columns: Int[Tensor, "position span sample"]
    """Places in the row; -1 where the sample has no token of the span."""

    @classmethod
    def of(cls, spans: Sequence[Span], samples: int) -> Places:
        """Return the places of spans that are on one device."""
        device = spans[0].mask.device
        longest = max(1, *(span.stop - span.start for span in spans))
        starts = torch.tensor([span.start for span in spans], device=device)
        rows = torch.zeros(len(spans), samples, dtype=torch.long, device=device)
        columns = torch.full((longest, len(spans), samples), -1, device=device)
        for number, span in enumerate(spans):
            own = torch.arange(samples, device=device) if span.samples is None else span.samples
            rows[number, own] = torch.arange(len(own), device=device) if span.rows is None else span.rows
            places = torch.arange(span.start, span.stop, device=device) if span.columns is None else span.columns
            columns[: span.stop - span.start, number, own] = torch.where(span.mask[:, 0] > 0, places, -1).T
        return cls(starts, rows, columns)

    def first_highest(
        self,
        values: Float[Tensor, "row place neuron"],
        spans: Int[Tensor, " n"],
        samples: Int[Tensor, " n"],
        neurons: Int[Tensor, " n"],
        signs: Float[Tensor, " n"],
    ) -> Int[Tensor, " n"]:
        """Return the first position of one span of a sample each where a neuron's value times a sign is highest."""
        # A few at a time: in a shard's first batches there are five per neuron.
        some = max(1, (READ if values.device.type == "cpu" else READ_ON_GPU) // len(self.columns))
        parts = (torch.split(one, some) for one in (spans, samples, neurons, signs))
        found = []
        for span, sample, neuron, sign in zip(*parts, strict=True):
            columns = self.columns[:, span, sample]
            # By places in the flat tensor: on a CPU several times as fast as by three indices.
            first = self.rows[span, sample] * values.shape[1] * values.shape[2] + neuron
            flat = (columns * values.shape[2] + first).clamp_(min=0)
            read = values.reshape(-1).index_select(0, flat.reshape(-1)).reshape(flat.shape)
            read = (read.float() * sign).masked_fill_(columns < 0, -torch.inf)
            # On a CPU `max` finds them in a fraction of the time of `argmax`.
            found.append(self.starts[span] + read.max(dim=0).indices)
        return torch.cat(found)


def _outside(mask: Float[Tensor, "sample 1 position"], *, gaps: bool) -> Float[Tensor, "sample position 1"] | None:
    """Return what extremes need to add; with `gaps`, positions without a token hold others' values."""
    if mask.all() if gaps else mask.any(dim=2).all():
        return None
    return torch.where(mask > 0, 0.0, -torch.inf).transpose(1, 2)


def _without_gaps(
    columns: Int[Tensor, "sample position"], mask: Float[Tensor, "sample 1 position"]
) -> Int[Tensor, "sample position"]:
    """Return the columns with those of each sample's first token where it has none."""
    return torch.where(mask[:, 0] > 0, columns, columns.gather(1, mask.argmax(dim=2)))


def token_spans(
    token_spans: Iterable[TokenSpan],
    samples: int,
    paths: Sequence[Path] | None = None,
    with_image: Sequence[int] | None = None,
) -> list[Span]:
    """Return the batch's span of each of MODALITIES; empty if it has no such token.

    That of images has the samples `with_image`; by default all.
    """
    spans = []
    by_modality: dict[str, list[TokenSpan]] = {modality: [] for modality in MODALITIES}
    for part in token_spans:
        by_modality[part.modality].append(part)
    for index, (modality, parts) in enumerate(by_modality.items()):
        start = min((part.start for part in parts), default=0)
        stop = max((part.stop for part in parts), default=0)
        own = list(range(samples)) if modality == "text" or with_image is None else list(with_image)
        number = {sample: index for index, sample in enumerate(own)}
        mask = torch.zeros(len(own), stop - start)
        for part in parts:
            mask[number[part.row], part.start - start : part.stop - start] = 1
        mask = mask[:, None]
        rows, columns = own if paths is None else [paths[sample].row for sample in own], None
        if paths is not None and modality == "text" and parts:
            columns = torch.zeros(len(own), stop - start, dtype=torch.long)
            for line, sample in enumerate(own):
                places = paths[sample].positions[start:stop]
                columns[line, : len(places)] = torch.tensor(places)
            columns = _without_gaps(columns, mask)
        as_they_are = columns is None and rows == list(range(row_count(samples, paths)))
        spans.append(
            Span(
                index,
                start,
                stop,
                mask,
                _outside(mask, gaps=columns is None),
                samples=None if len(own) == samples else torch.tensor(own, dtype=torch.long),
                rows=None if as_they_are else torch.tensor(rows, dtype=torch.long),
                columns=columns,
            )
        )
    return spans


def reduce_tokens(
    values: Float[Tensor, "sample position neuron"],
    gates: Float[Tensor, "sample position neuron"],
    spans: Sequence[Span],
) -> tuple[Float[Tensor, "modality 3 sample neuron"], Float[Tensor, "span sample side"]]:
    """Reduce over the spans' tokens in fp32: (active tokens, sum, sum of squares), and (maximum, negated minimum).

    Sums are by modality, extremes by span. A sample that a span leaves out has extremes of -inf there.
    """
    # A few samples at a time: a whole layer does not fit a CPU's cache, and a copy of it for the squares may not fit
    # the GPU. Sums are products with the mask, which is faster than indexing.
    width, samples = values.shape[2], max((len(span.mask) for span in spans), default=0)
    sums = values.new_zeros(len(MODALITIES), 3, samples, 1, width, dtype=torch.float32)
    reached = values.new_full((len(spans), samples, 2 * width), -torch.inf, dtype=torch.float32)
    together = (CACHED * torch.get_num_threads() if values.device.type == "cpu" else COPIED) // width
    for span, all_extremes in zip(spans, reached, strict=True):
        length, own, all_sums = span.stop - span.start, len(span.mask), sums[span.modality]
        summed, extremes = all_sums, all_extremes
        if span.samples is not None:
            summed, extremes = all_sums[:, span.samples], all_extremes[:own].clone()
        active, total, squares = summed
        step = max(1, together // max(1, length))
        buffer = values.new_empty(min(step, own), length, width, dtype=torch.float32)
        for first in range(0, own if length else 0, step):
            part = slice(first, first + step)
            wide, mask = span.read(values, part).float(), span.mask[part]
            scratch = buffer[: len(wide)]
            total[part].baddbmm_(mask, wide)
            if span.outside is None:
                torch.amax(wide, 1, out=extremes[part, :width])
                torch.amin(wide, 1, out=extremes[part, width:])
            else:
                # Tokens outside become −∞ for the maximum and +∞ for the minimum.
                torch.amax(torch.add(wide, span.outside[part], out=scratch), 1, out=extremes[part, :width])
                torch.amin(torch.sub(wide, span.outside[part], out=scratch), 1, out=extremes[part, width:])
            extremes[part, width:].neg_()
            squares[part].baddbmm_(mask, torch.mul(wide, wide, out=scratch))
            active[part].baddbmm_(mask, torch.gt(span.read(gates, part), 0, out=scratch))
        if span.samples is not None:
            all_sums.index_copy_(1, span.samples, summed)
            all_extremes.index_copy_(0, span.samples, extremes)
    return sums[:, :, :, 0], reached
