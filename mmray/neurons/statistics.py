"""What each neuron does over all tokens: activity by label and modality, and its most extreme samples.

Image and caption tokens count. Padding, special tokens and the prompt (the same in every sample) do not. An image that
several samples of the shard show counts once per label: in the first of them that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mmray.models.prompting import Path, TokenSpan, row_count
from mmray.neurons.tables import EXAMPLES, STATISTICS
from mmray.neurons.token_sums import MODALITIES, Span, reduce_tokens, token_spans

NO_IMAGE = torch.iinfo(torch.int64).min
"""An image number that no sample has."""


@dataclass(frozen=True)
class Best:
    """Extreme samples by rank. Sides are the neurons twice: their highest activations, then their negated lowest."""

    activation: Float[Tensor, "rank side"]
    sample: Int[Tensor, "rank side"]
    position: Int[Tensor, "rank side"]


@dataclass(frozen=True)
class _Batch:
    """A batch between `begin` and `commit`."""

    rows: int
    token_spans: list[TokenSpan]
    membership: Float[Tensor, "modality label sample"]
    """1 where a sample has a label, and for images where none before it showed the same image under the label."""
    shown: set[tuple[int, int]]
    """Pairs of label and image number that count for the first time."""
    spans: list[Span]
    images: Int[Tensor, " sample"]
    """Image number of each sample of the shard so far; the batch's own come last."""
    repeats: bool
    """Whether two of the batch's samples, or one and an earlier one, show the same image."""
    layers: list[tuple[int, Float64[Tensor, "modality quantity label neuron"], Int[Tensor, " side"], Best]] = field(
        default_factory=list
    )
    """Reduced layers: sums by label, and the sides that improve with their best samples."""
    non_finite: list[Int[Tensor, " sample"]] = field(default_factory=list)
    """Per layer, how many neurons have sums over a sample's tokens that are not finite."""
    moved: dict[torch.device, tuple[Tensor, list[Span], Tensor]] = field(default_factory=dict)

    def on(
        self, device: torch.device
    ) -> tuple[Float[Tensor, "modality label sample"], list[Span], Int[Tensor, " sample"]]:
        """Return membership, spans and images on a device; moved once per device that holds layers."""
        if device not in self.moved:
            spans = [part for span in self.spans for part in span.on(device)]
            self.moved[device] = self.membership.to(device), spans, self.images.to(device)
        return self.moved[device]


class TokenStatistics:
    """Accumulates one shard's statistics of every neuron, each layer's on the device that computes it.

    Labels are (kind, label) pairs; every sample also counts under ("all", "all"). `begin` announces a batch, `add`
    takes its layers, and `commit` counts it, so that a forward that fails midway leaves no trace.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = widths
        self.labels: dict[tuple[str, str], int] = {}
        self.tokens: dict[tuple[int, str], int] = {}
        self.sums: dict[tuple[int, str], list[Tensor | None]] = {}
        self.extremes: dict[int, _Extremes] = {}
        self.images: list[int] = []
        self._numbers: dict[str, int] = {}
        self._shown: set[tuple[int, int]] = set()
        self._batch = _Batch(0, [], torch.zeros(len(MODALITIES), 0, 0), set(), [], torch.zeros(0), False)

    @property
    def samples(self) -> int:
        """Samples counted so far."""
        return len(self.images)

    def begin(
        self,
        labels: Sequence[dict[str, str]],
        spans: Sequence[TokenSpan],
        images: Sequence[str | None] | None = None,
        paths: Sequence[Path] | None = None,
    ) -> None:
        """Announce a batch: its samples' labels by kind, the spans of images and captions, and the images' digests.

        A sample without a digest counts as an image of its own. Samples that share rows have `paths`.
        """
        members = [
            [self.labels.setdefault(pair, len(self.labels)) for pair in (("all", "all"), *kinds.items())]
            for kinds in labels
        ]
        own = [
            # Negative: numbers of digests count from zero.
            self._numbers.setdefault(image, len(self._numbers)) if image is not None else -1 - number
            for number, image in enumerate(images or [None] * len(labels), self.samples)
        ]
        # Matrices: one product adds samples up by label.
        membership = torch.zeros(len(MODALITIES), len(self.labels), len(labels))
        shown: set[tuple[int, int]] = set()
        for row, (image, indices) in enumerate(zip(own, members, strict=True)):
            new = {(label, image) for label in indices} - self._shown - shown
            shown |= new
            membership[MODALITIES.index("image"), [label for label, _ in new], row] = 1
            membership[MODALITIES.index("text"), indices, row] = 1
        counted = membership[MODALITIES.index("image")].any(dim=0).nonzero()[:, 0].tolist()
        kept = [span for span in spans if span.modality == "text" or span.row in counted]
        # Numbers of the batch come last, where `improved` looks for them.
        rows, numbers = row_count(len(labels), paths), torch.tensor([*self.images, *own])
        repeats = len(set(own)) < len(own) or not set(own).isdisjoint(self.images)
        found = token_spans(kept, len(labels), paths, counted)
        self._batch = _Batch(rows, kept, membership, shown, found, numbers, repeats)

    @torch.inference_mode()
    def add(self, layer: int, activation: Float[Tensor, "row neuron"], gate: Float[Tensor, "row neuron"]) -> None:
        """Reduce one layer of the announced batch; a neuron is active where its gate is positive."""
        batch = self._batch
        values, gates = (part.reshape(batch.rows, -1, part.shape[-1]) for part in (activation, gate))
        membership, spans, images = batch.on(values.device)
        by_sample, reached = reduce_tokens(values, gates, spans)
        # The squares show both: values that are not finite, and those whose square overflows fp32.
        batch.non_finite.append((~by_sample[:, 2].sum(0).isfinite()).sum(1))
        # fp64 from here on: sums over millions of tokens must not depend on their order.
        by_label = (membership[:, None] @ by_sample).double()
        if layer not in self.extremes:
            self.extremes[layer] = _Extremes(self.widths[layer], values.device)
        better = self.extremes[layer].improved(values, reached, spans, images, repeats=batch.repeats)
        batch.layers.append((layer, by_label, *better))

    def non_finite(self) -> list[int]:
        """Return per sample of the announced batch how many neurons have sums that are not finite."""
        return torch.stack([part.cpu() for part in self._batch.non_finite]).sum(0).tolist()

    @torch.inference_mode()
    def commit(self) -> None:
        """Count the announced batch."""
        batch = self._batch
        for layer, by_label, sides, better in batch.layers:
            self.extremes[layer].replace(sides, better)
            for modality, numbers in zip(MODALITIES, by_label, strict=True):
                for label, added in enumerate(numbers.unbind(1)):
                    sums = self.sums.setdefault((label, modality), [None] * len(self.widths))
                    before = sums[layer]
                    sums[layer] = added if before is None else before.add_(added)
        for span in batch.token_spans:
            counting = batch.membership[MODALITIES.index(span.modality), :, span.row]
            for label in counting.nonzero()[:, 0].tolist():
                key = (label, span.modality)
                self.tokens[key] = self.tokens.get(key, 0) + span.stop - span.start
        self._shown |= batch.shown
        self.images = batch.images.tolist()

    def activity_table(self, module: str = "language") -> pa.Table:
        """Return the shard's activity: one row per label and modality, with lists over the module's neurons."""
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
        """Return the shard's extreme samples: one row per sign and rank, with lists over all neurons.

        Samples are numbered in the order they were counted.
        """
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


class _Extremes:
    """The EXAMPLES highest and lowest samples of each neuron of a layer."""

    def __init__(self, width: int, device: torch.device) -> None:
        nothing = torch.full((EXAMPLES, 2 * width), -torch.inf, device=device)
        none = torch.zeros(nothing.shape, dtype=torch.int32, device=device)
        self.best = Best(nothing, none, none.clone())

    def improved(
        self,
        values: Float[Tensor, "sample position neuron"],
        reached: Float[Tensor, "span sample side"],
        spans: Sequence[Span],
        images: Int[Tensor, " sample"],
        *,
        repeats: bool,
    ) -> tuple[Int[Tensor, " side"], Best]:
        """Return the sides that a batch improves, and their new best samples, each of another image.

        `images` has the image number of each sample of the shard so far; the batch's own come last. Without `repeats`
        none of these occurred before.
        """
        highest, width = reached.amax(0), values.shape[2]
        first = len(images) - len(highest)
        sides = (highest.amax(0) > self.best.activation[-1]).nonzero()[:, 0]
        held, sample, position = (
            part.index_select(1, sides) for part in (self.best.activation, self.best.sample, self.best.position)
        )
        candidates = torch.cat([held, highest.index_select(1, sides)])
        image = None
        if repeats:
            image = torch.cat([images[sample], images[first:, None].expand(-1, len(sides))])
            # Empty ranks have sample 0: they must not stand in for its image.
            image.masked_fill_(candidates == -torch.inf, NO_IMAGE)
        activation, index = _highest_of_images(candidates, image)
        kept = index.clamp(max=EXAMPLES - 1)
        sample, position = sample.gather(0, kept), position.gather(0, kept)
        # The inverse of `index`: the rank of each candidate, −1 for none. Ranks without a candidate point at a row of
        # those held, and only the batch's own rows are read below.
        ranks = index.new_full((EXAMPLES + len(highest), len(sides)), -1)
        ranks.scatter_(0, index, torch.arange(EXAMPLES, device=index.device)[:, None].expand_as(index))
        # `nonzero` goes sample by sample, so that the reads below stay in the CPU's cache.
        row, column = (ranks[EXAMPLES:] >= 0).nonzero(as_tuple=True)
        rank = ranks[EXAMPLES + row, column]
        sample[rank, column] = (row + first).int()
        # Positions are looked up only for the few samples that enter a ranking.
        # Of equal ones the first of a modality counts, and that of a text rather than an image's: written last.
        for span, extremes in sorted(
            zip(spans, reached, strict=True), key=lambda pair: (pair[0].modality, -pair[0].start)
        ):
            found = activation[rank, column]
            here = ((extremes[row, sides[column]] == found) & (found > -torch.inf)).nonzero()[:, 0]
            if len(here):
                side = sides[column[here]]
                along = span.along(values, row[here], side % width, 1.0 - 2.0 * (side >= width))
                position[rank[here], column[here]] = (span.start + along.max(dim=0).indices).int()
        return sides, Best(activation, sample, position)

    def replace(self, sides: Int[Tensor, " side"], better: Best) -> None:
        """Replace the best samples of these sides."""
        self.best.activation[:, sides] = better.activation
        self.best.sample[:, sides] = better.sample
        self.best.position[:, sides] = better.position


def _highest_of_images(
    candidates: Float[Tensor, "candidate side"], images: Int[Tensor, "candidate side"] | None
) -> tuple[Float[Tensor, "rank side"], Int[Tensor, "rank side"]]:
    """Return the EXAMPLES highest candidates of different images, and their indices; missing ones are -inf.

    Of equal candidates the first counts, as in a stable sort. Without `images` each candidate has its own. Candidates
    are overwritten.
    """
    found = []
    for _ in range(EXAMPLES):
        highest = candidates.max(dim=0)
        found.append(highest)
        if images is None:
            candidates.scatter_(0, highest.indices[None], -torch.inf)
        else:
            candidates.masked_fill_(images == images.gather(0, highest.indices[None]), -torch.inf)
    return torch.stack([best.values for best in found]), torch.stack([best.indices for best in found])


def _side(best: Best, sign: int) -> list[Tensor]:
    return [part.chunk(2, dim=1)[0 if sign > 0 else 1] for part in (best.activation, best.sample, best.position)]
