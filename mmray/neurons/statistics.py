"""What each neuron does over all tokens: activity by label and modality, and its most extreme samples.

Image and caption tokens count. Padding, special tokens and the prompt (the same in every sample) do not. An image that
several samples of the shard show counts once per label: in the first of them that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mmray.models.prompting import Path, TokenSpan, row_count
from mmray.neurons.tables import EXAMPLES, STATISTICS
from mmray.neurons.token_sums import MODALITIES, Places, Span, reduce_tokens, token_spans

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
    groups: Int[Tensor, "group member"]
    """Numbers in the batch of consecutive samples that show one image; smaller groups repeat their last."""
    repeats: bool
    """Whether two groups, or one and a sample of an earlier batch, show the same image."""
    layers: list[tuple[int, Float64[Tensor, "modality quantity label neuron"], Int[Tensor, " side"], Best]] = field(
        default_factory=list
    )
    """Reduced layers: sums by label, and the sides that improve with their best samples."""
    non_finite: list[Int[Tensor, " sample"]] = field(default_factory=list)
    """Per layer, how many neurons have sums over a sample's tokens that are not finite."""
    moved: dict[torch.device, tuple[_Batch, Places]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[_Batch, Places]:
        """Return the batch with its tensors on a device, and its places; moved once per device that holds layers.

        Its spans are in the order in which the first to reach a sample's extreme counts: texts come first.
        """
        if device not in self.moved:
            spans = [part for span in reversed(self.spans) for part in span.on(device)]
            tensors = {name: getattr(self, name).to(device) for name in ("membership", "images", "groups")}
            batch = replace(self, spans=spans, moved={}, **tensors)
            self.moved[device] = batch, Places.of(spans, self.membership.shape[2])
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
        none = torch.zeros(0)
        self._batch = _Batch(0, [], torch.zeros(len(MODALITIES), 0, 0), set(), [], none, none, False)

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
        membership = np.zeros((len(MODALITIES), len(self.labels), len(labels)), np.float32)
        shown: set[tuple[int, int]] = set()
        for row, (image, indices) in enumerate(zip(own, members, strict=True)):
            new = {(label, image) for label in indices} - self._shown - shown
            shown |= new
            membership[MODALITIES.index("image"), [label for label, _ in new], row] = 1
            membership[MODALITIES.index("text"), indices, row] = 1
        counted = membership[MODALITIES.index("image")].any(axis=0).nonzero()[0].tolist()
        kept = [span for span in spans if span.modality == "text" or span.row in counted]
        groups = [list(members) for _, members in groupby(range(len(own)), key=own.__getitem__)]
        largest = max(map(len, groups), default=0)
        padded = [[*members, *members[-1:] * (largest - len(members))] for members in groups]
        self._batch = _Batch(
            row_count(len(labels), paths),
            kept,
            torch.from_numpy(membership),
            shown,
            token_spans(kept, len(labels), paths, counted),
            # The batch's own come last, where `improved` looks for them.
            torch.tensor([*self.images, *own]),
            torch.tensor(padded, dtype=torch.long).reshape(len(groups), largest),
            repeats=len(set(own)) < len(groups) or not set(own).isdisjoint(self.images),
        )

    @torch.inference_mode()
    def add(self, layer: int, activation: Float[Tensor, "row neuron"], gate: Float[Tensor, "row neuron"]) -> None:
        """Reduce one layer of the announced batch; a neuron is active where its gate is positive."""
        batch = self._batch
        values, gates = (part.reshape(batch.rows, -1, part.shape[-1]) for part in (activation, gate))
        local, places = batch.on(values.device)
        by_sample, reached = reduce_tokens(values, gates, local.spans)
        # The squares show both: values that are not finite, and those whose square overflows fp32.
        batch.non_finite.append((~by_sample[:, 2].sum(0).isfinite()).sum(1))
        # fp64 from here on: sums over millions of tokens must not depend on their order.
        by_label = (local.membership[:, None] @ by_sample).double()
        if layer not in self.extremes:
            self.extremes[layer] = _Extremes(self.widths[layer], values.device)
        better = self.extremes[layer].improved(values, reached, local, places)
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
        values: Float[Tensor, "row place neuron"],
        reached: Float[Tensor, "span sample side"],
        batch: _Batch,
        places: Places,
    ) -> tuple[Int[Tensor, " side"], Best]:
        """Return the sides that a batch improves, and their new best samples, each of another image."""
        highest, width = reached.amax(0), values.shape[2]
        first = len(batch.images) - len(highest)
        # Consecutive samples of an image are one candidate: in rows that they share, there are no others.
        of_image = highest if len(batch.groups) == len(highest) else highest[batch.groups].amax(1)
        sides = (of_image.amax(0) > self.best.activation[-1]).nonzero()[:, 0]
        held, sample, position = (
            part.index_select(1, sides) for part in (self.best.activation, self.best.sample, self.best.position)
        )
        candidates = torch.cat([held, of_image.index_select(1, sides)])
        image = None
        if batch.repeats:
            own = batch.images[first + batch.groups[:, :1]]
            image = torch.cat([batch.images[sample], own.expand(-1, len(sides))])
            # Empty ranks have sample 0: they must not stand in for its image.
            image.masked_fill_(candidates == -torch.inf, NO_IMAGE)
        activation, index = _highest_of_images(candidates, image)
        kept = index.clamp(max=EXAMPLES - 1)
        sample, position = sample.gather(0, kept), position.gather(0, kept)
        # The inverse of `index`: the rank of each candidate, −1 for none. Ranks without a candidate point at a row of
        # those held, and only the batch's own rows are read below.
        ranks = index.new_full((len(candidates), len(sides)), -1)
        ranks.scatter_(0, index, torch.arange(EXAMPLES, device=index.device)[:, None].expand_as(index))
        # `nonzero` goes image by image, so that the reads below stay in the CPU's cache.
        group, column = (ranks[EXAMPLES:] >= 0).nonzero(as_tuple=True)
        rank, side, members = ranks[EXAMPLES + group, column], sides[column], batch.groups[group]
        # Of an image's samples the first that reaches its extreme counts, and of positions the first of its text's.
        reaching = highest[members, side[:, None]].max(dim=1, keepdim=True).indices
        own = members.gather(1, reaching)[:, 0]
        sample[rank, column] = (own + first).int()
        # Positions are looked up only for the few samples that enter a ranking.
        within = reached.flatten(1).index_select(1, own * len(highest[0]) + side).max(dim=0).indices
        signs = 1.0 - 2.0 * (side >= width)
        position[rank, column] = places.first_highest(values, within, own, side % width, signs).int()
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
