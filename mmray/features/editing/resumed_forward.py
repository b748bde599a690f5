"""Run a batch once up to the first edited MLP, and resume from there at each step of learning.

What an edit of late layers can't change is computed once per batch: vision tower, projector, early blocks, and the
first edited block up to its MLP output. A step then adds what the deltas write, and runs the later blocks only. An
edit of the last layer needs no block at all, and only the positions that predict a token of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.errors import InputError
from mmray.features.editing.dataset import Example, batches
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.generation_cache import GenerationCache
from mmray.models.blocks import BlockCall, BlockRecorder, difference
from mmray.models.capture import capture_activations, capture_input
from mmray.models.loading import LoadedModel
from mmray.models.mlp_inputs import MlpInputs
from mmray.models.norms import vocabulary_logits
from mmray.models.packed_linear import packed_linears
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward


@dataclass(frozen=True)
class ResumedForward:
    """One batch after the first edited MLP.

    `targets[i]` is the token that position i predicts, and `rows[i]` the number of its answer. Positions are those of
    all answers' tokens, answer by answer.
    """

    model: LoadedModel
    targets: Int[Tensor, " position"]
    rows: Int[Tensor, " position"]
    positions: Int[Tensor, " position"] | None
    """Index of each into the flattened (row, position); None if `hidden` holds these positions alone."""
    hidden: Float[Tensor, "*rows hidden"]
    """Output of the first edited block, without the edit."""
    activation: Float[Tensor, "*rows unit"]
    """Of its edited neurons."""
    mlp_out: Float[Tensor, "*rows hidden"] | None
    """Output of its MLP, if a norm follows it."""
    later_blocks: tuple[BlockCall, ...]
    added_after: Tensor | None
    """What is added between the last block and the final norm."""
    entered: Float[Tensor, "*rows hidden"] | None
    """What the neurons of the first edited MLP read, where `MlpInputs` knows the rows that read it."""
    shaped: bool = False
    """Whether `activation` is times the left shape of the deltas."""

    def states(self, deltas: Deltas | None) -> Float[Tensor, "position hidden"]:
        """Return the final norm's input at the positions, with the deltas applied; None: without."""
        if deltas is None:
            hidden = self._run_later_blocks(self.hidden)
        else:
            layer = deltas.first
            # The first layer's part is added by hand: its MLP does not run again, so a hook there would never fire.
            with deltas.added(above=layer):
                written = deltas.output(layer, self.activation, self.entered, shaped=self.shaped)
                added = self._reaching_the_residual(layer, written)
                hidden = self._run_later_blocks(self.hidden + added)
        # A model may span several devices: everything learned from is on that of the first edited block.
        hidden = hidden.to(self.hidden.device)
        return hidden if self.positions is None else hidden.flatten(0, -2)[self.positions]

    def logits(self, deltas: Deltas | None = None) -> Float[Tensor, "position vocabulary"]:
        """Return the fp32 logits at the positions, with the deltas applied; None: without."""
        return vocabulary_logits(self.model, self.states(deltas)).to(self.hidden.device)

    def shaped_by(self, deltas: Deltas) -> ResumedForward:
        """Return the same forward for steps with these deltas alone, which then cost less."""
        return replace(self, activation=deltas.shaped(deltas.first, self.activation, self.entered), shaped=True)

    def at(self, chosen: Int[Tensor, " chosen"]) -> ResumedForward:
        """Return these positions alone; only for a forward without later blocks."""
        return replace(
            self,
            targets=self.targets[chosen],
            rows=self.rows[chosen],
            hidden=self.hidden[chosen],
            activation=self.activation[chosen],
            mlp_out=None if self.mlp_out is None else self.mlp_out[chosen],
            added_after=None if self.added_after is None else self.added_after[chosen],
            entered=None if self.entered is None else self.entered[chosen],
        )

    def _run_later_blocks(self, hidden: Tensor) -> Tensor:
        for block in self.later_blocks:
            hidden = block.run(hidden)
        return hidden if self.added_after is None else hidden + self.added_after

    def _reaching_the_residual(self, layer: int, added: Tensor) -> Tensor:
        """Return by how much the residual stream changes if `added` is added to the MLP output."""
        projection = self.model.projections[layer]
        if self.mlp_out is not None and projection.post_norm is not None:
            # A norm is not linear: its output for the sum is not the sum of its outputs.
            norm = self.model.network.get_submodule(projection.post_norm)
            added = norm(self.mlp_out + added.to(self.mlp_out.dtype)) - norm(self.mlp_out)
        # Mllama scales what its cross-attention blocks write; elsewhere the factor is 1.
        return added.to(self.hidden.dtype) * projection.scale


def resume_all(
    model: LoadedModel, examples: Sequence[Example], deltas: Deltas
) -> list[tuple[ResumedForward, list[Example]]]:
    """Return the resumed forwards of the examples, with the examples of each; one for all if no later block runs.

    If only the last layer is edited, answers with a `GenerationCache` need no forward.
    """
    cached = [example for example in examples if example.cache] if deltas.first == len(model.widths) - 1 else []
    # By identity, because examples are equal with and without a cache.
    skipped = set(map(id, cached))
    rest = [example for example in examples if id(example) not in skipped]
    parts = [(resume(model, batch, deltas), rows) for batch, rows in batched(model, rest)]
    if cached:
        parts.append((_from_caches(model, cached, deltas), cached))
    # Without later blocks only positions matter, so the batches can be joined.
    if len(parts) < 2 or parts[0][0].later_blocks:
        return parts
    return [(joined([part for part, _ in parts]), [row for _, rows in parts for row in rows])]


def recorded(model: LoadedModel, examples: Sequence[Example]) -> list[Example]:
    """Return the examples, each with a `GenerationCache`: edits of the last layer then need no forward of them.

    Routed experts stay without, because their neurons are too many to keep, and models that can't be resumed.
    """
    layer = len(model.widths) - 1
    if model.projections[layer].experts or not can_be_resumed(model):
        return list(examples)
    # Nothing is learned with these: they only say whose activations a resumed forward keeps.
    all_units = Deltas(model, [(layer, unit) for unit in range(model.widths[layer])])
    caches: dict[int, GenerationCache] = {}
    with packed_linears(model.network):
        for batch, rows in batched(model, [example for example in examples if example.cache is None]):
            part = resume(model, batch, all_units)
            for row, example in enumerate(rows):
                one = part.at((part.rows == row).nonzero()[:, 0])
                activation = one.activation.to(one.hidden.dtype)
                caches[id(example)] = GenerationCache(one.hidden, activation, one.mlp_out, one.added_after, one.entered)
    return [replace(example, cache=caches.get(id(example), example.cache)) for example in examples]


def _from_caches(model: LoadedModel, examples: Sequence[Example], deltas: Deltas) -> ResumedForward:
    """Return the resumed forward of answers with a cache, for an edit of the last layer."""
    caches = [example.cache for example in examples if example.cache]
    units = deltas.units[deltas.first]
    hidden, mlp_out, added_after, entered = _concatenated(caches)
    counts = torch.tensor([len(example.tokens) for example in examples], device=hidden.device)
    return ResumedForward(
        model=model,
        targets=torch.tensor([token for example in examples for token in example.tokens], device=hidden.device),
        rows=torch.repeat_interleave(counts),
        positions=None,
        hidden=hidden,
        activation=torch.cat([cache.activation[:, units].float() for cache in caches]),
        mlp_out=mlp_out,
        later_blocks=(),
        added_after=added_after,
        entered=entered,
    )


def joined(parts: Sequence[ResumedForward]) -> ResumedForward:
    """Return forwards without later blocks as one; their answers are numbered consecutively."""
    counts = accumulate((int(part.rows.max()) + 1 for part in parts), initial=0)
    hidden, mlp_out, added_after, entered = _concatenated(parts)
    return replace(
        parts[0],
        targets=torch.cat([part.targets for part in parts]),
        rows=torch.cat([part.rows + count for part, count in zip(parts, counts, strict=False)]),
        hidden=hidden,
        activation=torch.cat([part.activation for part in parts]),
        mlp_out=mlp_out,
        added_after=added_after,
        entered=entered,
    )


def _concatenated(
    parts: Sequence[ResumedForward] | Sequence[GenerationCache],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return `hidden`, `mlp_out`, `added_after` and `entered` of all parts."""
    mlp_out = [part.mlp_out for part in parts if part.mlp_out is not None]
    entered = [part.entered for part in parts if part.entered is not None]
    # One part may have nothing added after the last block where another has something.
    added = [torch.zeros_like(part.hidden) if part.added_after is None else part.added_after for part in parts]
    return (
        torch.cat([part.hidden for part in parts]),
        torch.cat(mlp_out) if mlp_out else None,
        torch.cat(added) if any(part.added_after is not None for part in parts) else None,
        torch.cat(entered) if entered else None,
    )


def batched(model: LoadedModel, examples: Sequence[Example]) -> list[tuple[Batch, list[Example]]]:
    """Return the examples as batches of similar length, with the examples of each batch's rows."""
    # By image first, because `batches` only joins neighbours; then by length, to save padding.
    ordered = sorted(examples, key=lambda example: (example.image is None, len(example.tokens)))
    found, start = [], 0
    for batch in batches(model, ordered):
        rows = len(batch.tokens)
        found.append((batch, ordered[start : start + rows]))
        start += rows
    return found


def can_be_resumed(model: LoadedModel) -> bool:
    """Return whether blocks end with their MLP, so that what an edit adds reaches their output unchanged."""
    return all(projection.ends_block for projection in model.projections)


@torch.no_grad()
def resume(model: LoadedModel, batch: Batch, deltas: Deltas) -> ResumedForward:
    """Forward the batch once, and keep what is needed to resume it from the first edited layer.

    Raises InputError if the blocks go on after their MLP: what an edit adds would not reach their output unchanged.
    """
    if not can_be_resumed(model):
        raise InputError(
            f"{model.name}: its blocks go on after their MLP, so edits can't be learned; use --method zero or scale"
        )
    first, projection = deltas.first, model.projections[deltas.first]
    recorder = BlockRecorder(model, first)
    activations: list[Tensor] = []
    mlp_outs: list[Tensor] = []
    entered: list[Tensor] = []
    inputs = MlpInputs.of(model.network, projection)

    def receive(_: int, activation: Tensor, __: Tensor) -> None:
        # Indexing copies, so the activations of all other neurons can be freed.
        activations.append(activation[:, deltas.units[first]].float())

    with ExitStack() as stack:
        stack.enter_context(capture_activations(model.network, [projection], receive))
        if projection.post_norm is not None:
            stack.enter_context(capture_input(model.network.get_submodule(projection.post_norm), mlp_outs.append))
        if inputs is not None:
            stack.enter_context(capture_input(inputs.reader, entered.append))
        stack.enter_context(recorder.recording())
        forward(model, batch)
    later_blocks = recorder.calls(first)
    hidden = recorder.outputs[first]
    # The logits at a position predict the next token, so an answer starts one position earlier.
    starts = [row * batch.positions + start - 1 for row, start in enumerate(batch.caption_start)]
    positions = torch.tensor(
        [start + index for start, tokens in zip(starts, batch.tokens, strict=True) for index in range(len(tokens))],
        device=hidden.device,
    )
    added_after = difference(recorder.final, recorder.outputs[max(recorder.outputs)])
    # Attention of later blocks needs whole sequences; else the answers' positions are enough.
    if later_blocks:
        chosen: Any = slice(None)
    else:
        hidden, chosen = hidden.flatten(0, -2), positions
        added_after = None if added_after is None else added_after.flatten(0, -2)[positions]
    return ResumedForward(
        model=model,
        targets=torch.tensor([token for tokens in batch.tokens for token in tokens], device=hidden.device),
        rows=torch.tensor([row for row, tokens in enumerate(batch.tokens) for _ in tokens], device=hidden.device),
        positions=positions if later_blocks else None,
        hidden=hidden[chosen],
        activation=activations[0].view(*hidden.shape[:-1], -1)[chosen],
        mlp_out=mlp_outs[0].view(hidden.shape)[chosen] if mlp_outs else None,
        entered=entered[0].view(hidden.shape)[chosen] if entered else None,
        later_blocks=tuple(later_blocks),
        added_after=added_after,
    )
