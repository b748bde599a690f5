"""The logit lens: every layer's output through the final norm and the unembedding, at image and text positions.

MMNeuron (Huo et al. 2024): entropy falls over the layers as features are aligned, combined and turned into words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.features.selectivity.masks import RANDOM, Mask, zeroed
from mmray.features.selectivity.tables import PARTS
from mmray.features.selectivity.texts import LabelledText, token_positions
from mmray.models.blocks import block_of, block_output
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward

KEPT_TOKENS = 50
"""Top tokens that a unit of work keeps per layer; the tables show ten of their sum."""
IMAGE_POSITIONS = 16
"""Image positions read per sample, evenly spread: the unembedding of all would take longer than the model."""


Key: TypeAlias = tuple[Mask | None, int, str]
"""Mask, layer, kind of position."""


@dataclass
class Stage:
    """Sums over the positions of one layer and kind."""

    n_tokens: int = 0
    entropy: float = 0.0
    agreed: int = 0
    shift: float = 0.0
    tokens: Counter[int] = field(default_factory=Counter)

    def add(self, other: Stage) -> None:
        """Add the sums over other positions."""
        self.n_tokens += other.n_tokens
        self.entropy += other.entropy
        self.agreed += other.agreed
        self.shift += other.shift
        self.tokens += other.tokens


class Lens:
    """Sums up the logit lens without a mask and under each, and how far each mask moves the hidden states.

    Under random masks only the latter, because the unembedding of every layer is slow.
    """

    def __init__(self, model: LoadedModel, masks: Sequence[Mask]) -> None:
        self.model = model
        self.masks = masks
        self.blocks = [block_of(model, layer) for layer in range(len(model.widths))]
        self._stages: dict[Key, Stage] = defaultdict(Stage)

    @torch.inference_mode()
    def add(self, texts: Sequence[LabelledText], batch: Batch) -> None:
        """Add a batch, or nothing of it if it fails."""
        found: dict[Key, Stage] = defaultdict(Stage)
        positions = {"image": _image_rows(batch), "text": _text_rows(batch, texts)}
        untouched = self._states(batch, positions)
        for mask in (None, *self.masks):
            with zeroed(self.model, mask):
                states = self._states(batch, positions) if mask else untouched
            for kind, layers in states.items():
                if len(layers[0]):
                    self._count(found, mask, kind, layers, untouched[kind])
        # Not before all masks are through: a batch that fails is run again in halves, and must not count twice.
        for key, stage in found.items():
            self._stages[key].add(stage)

    def table(self) -> pa.Table:
        """Return the sums, one row per mask, layer and kind of position."""
        rows = [
            {
                "module": mask and mask.module,
                "masked": mask and mask.label,
                "control": mask and mask.control,
                "layer": layer,
                "position": kind,
                "n_tokens": stage.n_tokens,
                "entropy": stage.entropy,
                "agreed": stage.agreed,
                "shift": stage.shift,
                "tokens": [
                    str(self.model.tokenizer.decode([token])) for token, _ in stage.tokens.most_common(KEPT_TOKENS)
                ],
                "counts": [count for _, count in stage.tokens.most_common(KEPT_TOKENS)],
            }
            for (mask, layer, kind), stage in self._stages.items()
        ]
        return pa.Table.from_pylist(rows, schema=PARTS["lens"])

    def _states(self, batch: Batch, positions: dict[str, Tensor]) -> dict[str, list[Float[Tensor, "position hidden"]]]:
        """Run the batch, and return each block's output at the positions of each kind."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in positions}

        def record(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = block_output(output)
            if self.model.streams is not None:
                states = self.model.streams.merge(states)
            for kind, rows in positions.items():
                found[kind].append(states.flatten(0, -2)[rows.to(states.device)])

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(record).remove)
            forward(self.model, batch)
        return found

    def _count(
        self,
        found: dict[Key, Stage],
        mask: Mask | None,
        kind: str,
        layers: list[Tensor],
        untouched: list[Tensor],
    ) -> None:
        for layer, (states, before) in enumerate(zip(layers, untouched, strict=True)):
            stage = found[mask, layer, kind]
            stage.n_tokens += len(states)
            change = (states - before).float().norm(dim=1) / before.float().norm(dim=1).clamp(min=1e-12)
            stage.shift += float(change.sum())
        if mask is not None and mask.control == RANDOM:
            return
        # Agreement is with the last layer under the same mask.
        last = vocabulary_logits(self.model, layers[-1]).argmax(dim=1)
        for layer, states in enumerate(layers):
            stage = found[mask, layer, kind]
            # One layer at a time: the logits of all would be layers × positions × vocabulary.
            logits = vocabulary_logits(self.model, states)
            logs = logits.log_softmax(dim=1)
            top = logits.argmax(dim=1)
            stage.entropy += float(-(logs.exp() * logs).sum())
            stage.agreed += int((top == last).sum())
            stage.tokens.update(top.tolist())


def _image_rows(batch: Batch) -> Int[Tensor, " position"]:
    """Return IMAGE_POSITIONS positions of each image, as rows of the flattened batch."""
    rows: dict[int, list[int]] = {}
    for run in batch.spans:
        if run.modality == "image":
            rows.setdefault(run.row, []).extend(range(run.start, run.stop))
    chosen = [
        row * batch.positions + positions[number * len(positions) // count]
        for row, positions in rows.items()
        for count in [min(IMAGE_POSITIONS, len(positions))]
        for number in range(count)
    ]
    return torch.tensor(chosen, dtype=torch.long)


def _text_rows(batch: Batch, texts: Sequence[LabelledText]) -> Int[Tensor, " position"]:
    """Return the positions that predict the texts' tokens, as rows of the flattened batch."""
    positions = token_positions(batch, texts)
    return torch.tensor([each.row * batch.positions + each.position for each in positions], dtype=torch.long)
