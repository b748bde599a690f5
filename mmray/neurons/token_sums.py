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
LINE = 16
"""Values of a cache line."""


@dataclass(frozen=True)
class Span:
    """Positions `[start, stop)` that contain all tokens of one modality, of some or all samples of a batch."""

    start: int
    stop: int
    mask: Float[Tensor, "sample 1 position"]
    """1 where the position holds such a token."""
    outside: Float[Tensor, "sample position 1"] | None
    """-inf where it does not, else 0; None if every position holds one."""
    samples: Int[Tensor, " sample"] | None = None
    """Their numbers in the batch; None: all samples."""
    rows: Int[Tensor, " sample"] | None = None
    """Their rows; None: one each, in order."""
    columns: Int[Tensor, "sample position"] | None = None
    """Places of the positions in the row; None: the positions themselves."""
    runs: Sequence[slice | None] = ()
    """Per sample, which positions of the span hold its tokens; None if they do not follow each other."""

    def to(self, device: torch.device) -> Span:
        """Return the span with its tensors on the device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def read(
        self, values: Float[Tensor, "row place neuron"], part: slice, within: slice
    ) -> Float[Tensor, "sample position neuron"]:
        """Return the values of some of the samples at some of the positions; a view where rows are read as they are."""
        if self.columns is not None and self.rows is not None:
            return values[self.rows[part, None], self.columns[part, within]]
        return values[part if self.rows is None else self.rows[part], self.start : self.stop][:, within]

    def along(
        self,
        values: Float[Tensor, "row place neuron"],
        samples: Int[Tensor, " n"],
        neurons: Int[Tensor, " n"],
        signs: Float[Tensor, " n"],
    ) -> Float[Tensor, "position n"]:
        """Return one neuron's values times a sign at the positions of one sample each; -inf outside the modality."""
        own = samples if self.samples is None else torch.searchsorted(self.samples, samples)
        rows = own if self.rows is None else self.rows[own]
        if self.columns is None and values.device.type == "cpu":
            # Sample by sample and position by position: what is read is then next to each other in memory.
            numbers, counts = torch.unique_consecutive(rows, return_counts=True)
            parts = zip(numbers.tolist(), torch.split(neurons, counts.tolist()), strict=True)
            found = torch.cat([values[row, self.start : self.stop].index_select(1, part) for row, part in parts], 1)
        else:
            places = torch.arange(self.start, self.stop, device=values.device)[:, None]
            found = values[rows, places if self.columns is None else self.columns[own].T, neurons]
        found = found.float() * signs
        return found if self.outside is None else found + self.outside[own, :, 0].T


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
    for modality, parts in by_modality.items():
        start = min((part.start for part in parts), default=0)
        stop = max((part.stop for part in parts), default=0)
        own = list(range(samples)) if modality == "text" or with_image is None else list(with_image)
        number = {sample: index for index, sample in enumerate(own)}
        mask = torch.zeros(len(own), stop - start)
        for part in parts:
            mask[number[part.row], part.start - start : part.stop - start] = 1
        outside = None if mask.all() else torch.where(mask > 0, 0.0, -torch.inf)[:, :, None]
        rows, columns = own if paths is None else [paths[sample].row for sample in own], None
        if paths is not None and modality == "text":
            columns = torch.zeros(len(own), stop - start, dtype=torch.long)
            for index, sample in enumerate(own):
                places = paths[sample].positions[start:stop]
                columns[index, : len(places)] = torch.tensor(places)
        as_they_are = columns is None and rows == list(range(row_count(samples, paths)))
        spans.append(
            Span(
                start,
                stop,
                mask[:, None],
                outside,
                samples=None if len(own) == samples else torch.tensor(own, dtype=torch.long),
                rows=None if as_they_are else torch.tensor(rows, dtype=torch.long),
                columns=columns,
                runs=[_run(one) for one in mask],
            )
        )
    return spans


def _run(mask: Float[Tensor, " position"]) -> slice | None:
    """Return where the mask is 1, if that is a single run."""
    places = mask.nonzero()[:, 0].tolist()
    return slice(places[0], places[-1] + 1) if places and places[-1] - places[0] < len(places) else None


def reduce_tokens(
    values: Float[Tensor, "sample position neuron"],
    gates: Float[Tensor, "sample position neuron"],
    spans: Sequence[Span],
) -> tuple[Float[Tensor, "modality 3 sample neuron"], Float[Tensor, "modality sample side"]]:
    """Reduce over the spans' tokens in fp32: (active tokens, sum, sum of squares), and (maximum, negated minimum).

    A sample that a span leaves out has sums of 0 and extremes of -inf there.
    """
    width, samples = values.shape[2], max(len(span.mask) for span in spans)
    sums = values.new_zeros(len(spans), 3, samples, 1, width, dtype=torch.float32)
    reached = values.new_full((len(spans), samples, 2, width), -torch.inf, dtype=torch.float32)
    for span, all_sums, all_extremes in zip(spans, sums, reached, strict=True):
        own, summed, extremes = len(span.mask), all_sums, all_extremes
        if span.samples is not None:
            summed, extremes = all_sums[:, :own].clone(), all_extremes[:own].clone()
        if span.stop > span.start:
            _reduce_span(values, gates, span, summed, extremes)
        if span.samples is not None:
            all_sums.index_copy_(1, span.samples, summed)
            all_extremes.index_copy_(0, span.samples, extremes)
    return sums[:, :, :, 0], reached.flatten(2)


def _reduce_span(
    values: Float[Tensor, "row place neuron"],
    gates: Float[Tensor, "row place neuron"],
    span: Span,
    sums: Float[Tensor, "3 sample 1 neuron"],
    extremes: Float[Tensor, "sample 2 neuron"],
) -> None:
    """Write what `reduce_tokens` returns for one span."""
    # A few samples at a time, or one and a few of its neurons: five passes over a tile that stays in a CPU's cache cost
    # less than one over memory, and a GPU may have no room for a copy of the whole layer.
    together = CACHED * torch.get_num_threads() if values.device.type == "cpu" else COPIED
    length, width, own = span.stop - span.start, values.shape[2], len(span.mask)
    step = max(1, together // (length * width))
    for first in range(0, own, step):
        part, within, outside = slice(first, first + step), slice(None), span.outside
        # One sample is read without padding.
        if step == 1 and (run := span.runs[first]) is not None:
            within, outside = run, None
        mask = span.mask[part, :, within]
        read, read_gates = span.read(values, part, within), span.read(gates, part, within)
        # Tiles of about equal width, which is a multiple of a cache line's.
        tiles = -(-read.numel() // together)
        wide = -(-width // (tiles * LINE)) * LINE
        for left in range(0, width, wide):
            some = slice(left, left + wide)
            (active, total, squares), (above, below) = sums[:, part, :, some], extremes[part, :, some].unbind(1)
            tile = read[..., some].float()
            scratch = torch.empty_like(tile, memory_format=torch.contiguous_format)
            torch.bmm(mask, tile, out=total)
            if outside is None:
                torch.amax(tile, 1, out=above)
                torch.amin(tile, 1, out=below)
            else:
                # Tokens outside become −∞ for the maximum and +∞ for the minimum.
                torch.amax(torch.add(tile, outside[part], out=scratch), 1, out=above)
                torch.amin(torch.sub(tile, outside[part], out=scratch), 1, out=below)
            below.neg_()
            torch.bmm(mask, torch.mul(tile, tile, out=scratch), out=squares)
            torch.bmm(mask, torch.gt(read_gates[..., some], 0, out=scratch), out=active)
