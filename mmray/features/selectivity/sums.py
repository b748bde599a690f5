"""Sums per replicate and label from one pass over samples; the selection sees nothing else.

For lape these are counts of active tokens; for contribution, contributions to the text's tokens, in logits after the
final norm. Replicate 0 also has sums of squares and, for steering, of activations at each text's first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mmray.errors import InputError
from mmray.features.selectivity.replicates import Replicates
from mmray.features.selectivity.selection import number_of
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.tables import PARTS
from mmray.features.selectivity.texts import LabelledText, by_text, token_positions
from mmray.models.capture import capture_activations
from mmray.models.loading import LoadedModel
from mmray.models.options import TEXT_BRANCH
from mmray.models.prompting import POSITIONS, Batch, TokenSpan
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.module_activity import image_spans, question_spans, uniform
from mmray.neurons.scoring import score_captured
from mmray.neurons.token_sums import Span, reduce_tokens, token_spans
from mmray.runs.tables import vector_column

VALUES_AT_ONCE = 2**27
"""Values, one per token and neuron, that a batch keeps at most; each takes about 16 bytes."""
STEPS = 12
"""First tokens of a text whose activations are summed separately; later tokens count as the last of them."""


Quantity: TypeAlias = tuple[str, Float[Tensor, "row sample"], Float[Tensor, "sample neuron"], Float[Tensor, " sample"]]
"""A quantity of a batch: its name, the weight of each sample in each row, sums per sample, and tokens per sample."""


@dataclass
class Activity:
    """A forward pass through a module, per layer: open tokens, sum and sum of squares of each sample and neuron."""

    spans: list[Span] = field(default_factory=list)
    layers: dict[int, Float[Tensor, "3 sample neuron"]] = field(default_factory=dict)


class LabelSums:
    """Adds up a value per neuron, and tokens, for each quantity, replicate and label."""

    def __init__(self, model: LoadedModel, settings: SelectivitySettings, replicates: Replicates) -> None:
        self.model = model
        self.settings = settings
        self.replicates = replicates
        self.projections = model.parts.mlps(settings.module)
        if not self.projections:
            raise InputError(f"{model.name}: --module {settings.module}: it has no MLP; see mmray check-model")
        self.width = sum(projection.width for projection in self.projections)
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    @torch.inference_mode()
    def add(self, texts: Sequence[LabelledText], batch: Batch) -> None:
        """Add a batch, or nothing of it if it fails.

        Raises ValueError if images of different sizes share it and the module is a tower.
        """
        if self.settings.module in ("vision", "projector") and len(texts) > 1 and not uniform(batch):
            raise ValueError("images of different sizes can't share a batch with --module vision or projector")
        weights = self.replicates.matrix([text.sample_id for text in texts])
        positions = token_positions(batch, texts)
        contributions = self.settings.method == "contribution"
        with ExitStack() as stack:
            activity = None if contributions else stack.enter_context(self._counting(batch))
            needs_cache = contributions or self.settings.steer is not None
            cache = stack.enter_context(cache_activations(self.model, batch, positions)) if needs_cache else None
            forward(self.model, batch)
        # Collected first, so that a batch that runs out of memory midway adds nothing; its halves will.
        quantities: list[Quantity] = []
        if activity is not None:
            quantities += self._activity(activity, weights)
        if cache is not None and contributions:
            quantities += self._contributions(cache, by_text(positions), weights)
        if cache is not None and self.settings.steer is not None:
            quantities += self._per_token(cache, by_text(positions), weights)
        for quantity in quantities:
            self._add(*quantity)

    @property
    def most_tokens(self) -> int:
        """Most tokens of a batch, fewer where every neuron's value at every token is kept."""
        kept = self.settings.method == "contribution" or self.settings.steer is not None
        return min(POSITIONS, max(1, VALUES_AT_ONCE // self.width)) if kept else POSITIONS

    def table(self) -> pa.Table:
        """Return the sums, one row per quantity, replicate and label."""
        labels, schema = self.replicates.labels, PARTS["sums"]
        tables = [schema.empty_table()]
        for quantity, sums in self._sums.items():
            numbers = np.arange(len(sums))
            columns = {
                "quantity": pa.repeat(quantity, len(sums)),
                "replicate": numbers // len(labels),
                "label": [labels[number % len(labels)] for number in range(len(sums))],
                "n_tokens": self._tokens[quantity].long().numpy(),
                "values": vector_column(sums.numpy().astype(number_of(quantity)), np.ones(len(sums), bool)),
            }
            tables.append(pa.table(columns, schema=schema))
        return pa.concat_tables(tables)

    def _add(
        self,
        quantity: str,
        weights: Float[Tensor, "row sample"],
        by_sample: Float[Tensor, "sample neuron"],
        tokens: Float[Tensor, " sample"],
    ) -> None:
        # One product serves all replicates, in fp64 so that sums don't depend on how samples were batched.
        added = (weights.to(by_sample.device).double() @ by_sample.double()).cpu()
        counts = weights.double() @ tokens.double()
        total = self._sums.get(quantity)
        self._sums[quantity] = added if total is None else total.add_(added)
        self._tokens[quantity] = counts if total is None else self._tokens[quantity].add_(counts)

    @contextmanager
    def _counting(self, batch: Batch) -> Iterator[Activity]:
        """Record the module's activity in the forward pass of the with-block, layer by layer."""
        rows, activity = len(batch.tokens), Activity()

        def receive(layer: int, activation: Tensor, gate: Tensor) -> None:
            values, gates = (part.reshape(rows, -1, part.shape[-1]) for part in (activation, gate))
            if not activity.spans:
                activity.spans.extend(self._spans(batch, values.shape[1]))
            summed, _ = reduce_tokens(
                values, gates, [part for span in activity.spans for part in span.on(values.device)]
            )
            activity.layers[layer] = summed.sum(dim=0).cpu()

        with capture_activations(self.model.network, self.projections, receive):
            yield activity

    def _activity(self, activity: Activity, weights: Tensor) -> Iterator[Quantity]:
        if not activity.layers:
            return  # a batch without images does not go through a tower
        rows = weights.shape[1]
        # Without an image Mllama skips its cross-attention blocks, so their neurons are never active.
        layers = [
            activity.layers.get(layer, torch.zeros(3, rows, projection.width))
            for layer, projection in enumerate(self.projections)
        ]
        active, _, squares = torch.cat(layers, dim=2)
        tokens = torch.stack([span.mask.cpu().sum(dim=(1, 2)) for span in activity.spans]).sum(dim=0)
        yield "active", weights, active, tokens
        yield "squares", self._observed(weights), squares, tokens

    def _observed(self, weights: Tensor) -> Float[Tensor, "label sample"]:
        """Return the rows of replicate 0, the data as it is."""
        return weights[: len(self.replicates.labels)]

    def _spans(self, batch: Batch, positions: int) -> list[Span]:
        module, modality = self.settings.module, self.settings.modality
        if module == TEXT_BRANCH:
            found = question_spans(batch)
        elif module != "language":
            found = image_spans(self.model, batch, positions)
        elif modality == "all":
            ends = [start + len(tokens) for start, tokens in zip(batch.caption_start, batch.tokens, strict=True)]
            found = [TokenSpan(row, 0, end, "text") for row, end in enumerate(ends)]
        else:
            found = [span for span in batch.spans if span.modality == modality]
        return token_spans(found, len(batch.tokens))

    def _contributions(self, cache: ActivationCache, texts: Sequence[slice], weights: Tensor) -> Iterator[Quantity]:
        scored = score_captured(self.model, cache, "contribution", folded=True)
        tokens = _sizes(texts)
        yield "contribution", weights, _summed(scored.scores, texts), tokens
        squares = [layer.square() for layer in scored.activation]
        yield "squares", self._observed(weights), _summed(squares, texts), tokens

    def _per_token(self, cache: ActivationCache, texts: Sequence[slice], weights: Tensor) -> Iterator[Quantity]:
        """Yield sums of squared activations over each text, and sums of activations at each of its first tokens."""
        layers = [cache.activations[layer] for layer in range(len(self.projections))]
        observed = self._observed(weights)
        yield "spread", observed, _summed([layer.square() for layer in layers], texts), _sizes(texts)
        for number in range(STEPS):
            step = [_subslice(text, number, number + 1 if number < STEPS - 1 else None) for text in texts]
            # No quantity for tokens that no text of the batch has.
            if _sizes(step).any():
                yield f"course {number:02d}", observed, _summed(layers, step), _sizes(step)


def _subslice(text: slice, start: int, stop: int | None) -> slice:
    """Return some tokens of a text, counted from its first; empty if it has fewer."""
    tokens = range(text.start, text.stop)[start:stop]
    return slice(tokens.start, tokens.stop)


def _sizes(texts: Sequence[slice]) -> Float[Tensor, " text"]:
    return torch.tensor([float(text.stop - text.start) for text in texts])


def _summed(layers: Sequence[Float[Tensor, "position neuron"]], texts: Sequence[slice]) -> Float[Tensor, "text neuron"]:
    return torch.cat([torch.stack([layer[text].sum(dim=0) for text in texts]).cpu() for layer in layers], dim=1)
