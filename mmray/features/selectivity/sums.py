"""One pass over samples → sums by replicate and label of what neurons do: the only thing that selection looks at.

Of lape the active tokens, of contribution the contributions to the text's tokens, in logits after the final norm.
Besides, of the data as it is: sums of squares, and for steering the activations at each of a text's first tokens.
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
from mmray.features.selectivity.material import Said, by_text, token_places
from mmray.features.selectivity.replicates import Replicates
from mmray.features.selectivity.selection import number_of
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.tables import PARTS
from mmray.models.capture import capture_activations
from mmray.models.layout import Projection
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import ActivationCache, cache_activations, forward
from mmray.neurons.module_activity import image_spans, uniform
from mmray.neurons.scoring import score_captured
from mmray.neurons.statistics import MODALITIES, Span, reduce_tokens, token_spans
from mmray.runs.tables import vector_column

STEPS = 12
"""First tokens of a text whose activations are kept apart; later ones count as the last of them."""


Found: TypeAlias = tuple[str, Float[Tensor, "row sample"], Float[Tensor, "sample neuron"], Float[Tensor, " sample"]]
"""A quantity of a batch: its name, how often each sample counts in each row, its sums by sample, and their tokens."""


def projections_of(model: LoadedModel, module: str) -> tuple[Projection, ...]:
    """Return the MLPs of a module that can be told apart by image or text; raises InputError where there is none."""
    found = model.parts.image_path(module)
    if not found:
        raise InputError(f"{model.name}: --module {module}: there is no MLP in it; see mmray check-model")
    return found


@dataclass
class Activity:
    """What a forward shows of a module: of each layer [open tokens, sum, sum of squares; sample; neuron]."""

    spans: list[Span] = field(default_factory=list)
    layers: dict[int, Float[Tensor, "3 sample neuron"]] = field(default_factory=dict)


class LabelSums:
    """Adds up what a pass over samples shows; `quantity, replicate, label` → a number a neuron, and tokens."""

    def __init__(self, model: LoadedModel, settings: SelectivitySettings, replicates: Replicates) -> None:
        self.model = model
        self.settings = settings
        self.replicates = replicates
        self.projections = projections_of(model, settings.module)
        self.width = sum(projection.width for projection in self.projections)
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    @torch.inference_mode()
    def add(self, texts: Sequence[Said], batch: Batch) -> None:
        """Take in a batch, or nothing of it where that fails.

        Raises ValueError where images of different sizes share it and a tower is looked at.
        """
        if self.settings.module != "language" and len(texts) > 1 and not uniform(batch):
            raise ValueError("images of different sizes share no batch with --module vision or projector")
        counted = self.replicates.matrix([said.sample_id for said in texts])
        places = token_places(batch, texts)
        contributions = self.settings.method == "contribution"
        with ExitStack() as stack:
            activity = None if contributions else stack.enter_context(self._counting(batch))
            looked_at = contributions or self.settings.steer is not None
            captured = stack.enter_context(cache_activations(self.model, batch, places)) if looked_at else None
            forward(self.model, batch)
        found: list[Found] = []
        if activity is not None:
            found += self._activity(activity, counted)
        if captured is not None and contributions:
            found += self._contributions(captured, by_text(places), counted)
        if captured is not None and self.settings.steer is not None:
            found += self._course(captured, by_text(places), counted)
        for quantity in found:
            self._add(*quantity)

    def table(self) -> pa.Table:
        """Return the sums: a row a quantity, replicate and label."""
        labels, schema = self.replicates.labels, PARTS["sums"]
        tables = [schema.empty_table()]
        for quantity, sums in self._sums.items():
            numbers = np.arange(len(sums))
            columns = {
                "quantity": pa.repeat(quantity, len(sums)),
                "replicate": numbers // len(labels),
                "label": [labels[number % len(labels)] for number in numbers],
                "n_tokens": self._tokens[quantity].long().numpy(),
                "values": vector_column(sums.numpy().astype(number_of(quantity)), np.ones(len(sums), bool)),
            }
            tables.append(pa.table(columns, schema=schema))
        return pa.concat_tables(tables)

    def _add(
        self,
        quantity: str,
        counted: Float[Tensor, "row sample"],
        by_sample: Float[Tensor, "sample neuron"],
        tokens: Float[Tensor, " sample"],
    ) -> None:
        added = (counted.to(by_sample.device).double() @ by_sample.double()).cpu()
        counts = counted.double() @ tokens.double()
        before = self._sums.get(quantity)
        self._sums[quantity] = added if before is None else before.add_(added)
        self._tokens[quantity] = counts if before is None else self._tokens[quantity].add_(counts)

    @contextmanager
    def _counting(self, batch: Batch) -> Iterator[Activity]:
        """Count what the block's forward shows of the module, layer by layer."""
        rows, activity = len(batch.tokens), Activity()

        def receive(layer: int, activation: Tensor, opened: Tensor) -> None:
            values, gates = (part.reshape(rows, -1, part.shape[-1]) for part in (activation, opened))
            if not activity.spans:
                activity.spans.extend(self._spans(batch, values.shape[1]))
            summed, _ = reduce_tokens(values, gates, [span.to(values.device) for span in activity.spans])
            activity.layers[layer] = summed.sum(dim=0).cpu()

        with capture_activations(self.model.network, self.projections, receive):
            yield activity

    def _activity(self, activity: Activity, counted: Tensor) -> Iterator[Found]:
        if not activity.layers:
            return  # text alone does not go through a tower
        rows = counted.shape[1]
        # Without an image Mllama leaves its cross-attention blocks out: their neurons do nothing.
        layers = [
            activity.layers.get(layer, torch.zeros(3, rows, projection.width))
            for layer, projection in enumerate(self.projections)
        ]
        active, _, squares = torch.cat(layers, dim=2)
        tokens = torch.stack([span.mask.cpu().sum(dim=(1, 2)) for span in activity.spans]).sum(dim=0)
        yield "active", counted, active, tokens
        yield "squares", self._observed(counted), squares, tokens

    def _observed(self, counted: Tensor) -> Float[Tensor, "label sample"]:
        """Return the rows of the data as it is."""
        return counted[: len(self.replicates.labels)]

    def _spans(self, batch: Batch, positions: int) -> list[Span]:
        rows = len(batch.tokens)
        if self.settings.module != "language":
            return token_spans(image_spans(self.model, batch, positions), rows)
        modality = self.settings.modality
        wanted = MODALITIES if modality == "both" else (modality,)
        spans = token_spans(batch.spans, rows)
        return [span for name, span in zip(MODALITIES, spans, strict=True) if name in wanted]

    def _contributions(self, captured: ActivationCache, parts: Sequence[slice], counted: Tensor) -> Iterator[Found]:
        scored = score_captured(self.model, captured, "contribution", folded=True)
        tokens = _sizes(parts)
        yield "contribution", counted, _summed(scored.scores, parts), tokens
        squares = [layer.square() for layer in scored.activation]
        yield "squares", self._observed(counted), _summed(squares, parts), tokens

    def _course(self, captured: ActivationCache, parts: Sequence[slice], counted: Tensor) -> Iterator[Found]:
        """Yield the activations at the places that write a text: at each of its first tokens, and how they spread."""
        layers = [captured.activations[layer] for layer in range(len(self.projections))]
        observed = self._observed(counted)
        yield "spread", observed, _summed([layer.square() for layer in layers], parts), _sizes(parts)
        for number in range(STEPS):
            own = [
                slice(min(part.start + number, part.stop), min(part.start + number + 1, part.stop)) for part in parts
            ]
            if number == STEPS - 1:
                own = [slice(place.start, part.stop) for place, part in zip(own, parts, strict=True)]
            if _sizes(own).any():
                yield f"course {number:02d}", observed, _summed(layers, own), _sizes(own)


def _sizes(parts: Sequence[slice]) -> Float[Tensor, " text"]:
    return torch.tensor([float(part.stop - part.start) for part in parts])


def _summed(layers: Sequence[Float[Tensor, "place neuron"]], parts: Sequence[slice]) -> Float[Tensor, "text neuron"]:
    return torch.cat([torch.stack([layer[part].sum(dim=0) for part in parts]).cpu() for layer in layers], dim=1)
