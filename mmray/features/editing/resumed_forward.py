"""A batch behind the first edited MLP: run once up to there, and from there again at each step of learning.

What an edit of late layers can't change is computed once a batch: vision tower, projector, early blocks, and the first
edited block up to what its MLP writes. A step then adds what the deltas write, and runs the later blocks alone. An edit
of the last layer needs no block at all, and only the places that predict a token of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from mmray.features.editing.dataset import Example, batches
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.generation_cache import GenerationCache
from mmray.models.blocks import block_of, left_by
from mmray.models.capture import capture_activations, capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import forward


@dataclass(frozen=True)
class _Later:
    """A block after the first edited one: its inputs other than hidden states, and what was added before it."""

    block: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    hidden_named: bool
    before: Tensor | None

    def run(self, hidden: Tensor) -> Tensor:
        """Return what the block makes of these hidden states."""
        if self.before is not None:
            hidden = hidden + self.before
        if self.hidden_named:
            return left_by(self.block(*self.arguments, hidden_states=hidden, **self.named))
        return left_by(self.block(hidden, *self.arguments, **self.named))


@dataclass(frozen=True)
class ResumedForward:
    """One batch behind the first edited MLP.

    `targets[place]` is the token that the place predicts, of the row `rows[place]`; places run row by row over all
    tokens of the answers.
    """

    model: LoadedModel
    targets: Int[Tensor, " place"]
    rows: Int[Tensor, " place"]
    places: Int[Tensor, " place"] | None
    """Index of each place in (row, position); None where `hidden` has the places alone."""
    hidden: Float[Tensor, "*rows hidden"]
    """What leaves the first edited block, untouched."""
    activation: Float[Tensor, "*rows unit"]
    """Of its edited neurons."""
    written: Float[Tensor, "*rows hidden"] | None
    """What its MLP writes, where a norm stands behind it."""
    later: tuple[_Later, ...]
    after: Tensor | None
    """What was added between the last block and the final norm."""

    def states(self, deltas: Deltas | None) -> Float[Tensor, "place hidden"]:
        """Return the final norm's input at the places, with what the deltas write; None: without."""
        if deltas is None:
            hidden = self._behind(self.hidden)
        else:
            layer = deltas.first
            with deltas.added(beyond=layer):
                hidden = self._behind(self.hidden + self._through(layer, deltas.written(layer, self.activation)))
        # Of a model on several devices, all of learning is where the first edited block is.
        hidden = hidden.to(self.hidden.device)
        return hidden if self.places is None else hidden.flatten(0, -2)[self.places]

    def logits(self, deltas: Deltas | None = None) -> Float[Tensor, "place vocabulary"]:
        """Return the logits, in fp32, at the places, with what the deltas write; None: without."""
        return vocabulary_logits(self.model, self.states(deltas)).to(self.hidden.device)

    def at(self, chosen: Int[Tensor, " chosen"]) -> ResumedForward:
        """Return the tail with these places alone; of one without later blocks."""
        return replace(
            self,
            targets=self.targets[chosen],
            rows=self.rows[chosen],
            hidden=self.hidden[chosen],
            activation=self.activation[chosen],
            written=None if self.written is None else self.written[chosen],
            after=None if self.after is None else self.after[chosen],
        )

    def _behind(self, hidden: Tensor) -> Tensor:
        for block in self.later:
            hidden = block.run(hidden)
        return hidden if self.after is None else hidden + self.after

    def _through(self, layer: int, added: Tensor) -> Tensor:
        """Return what reaches the residual stream of something added to what the MLP writes."""
        projection = self.model.projections[layer]
        if self.written is not None and projection.post_norm is not None:
            norm = self.model.network.get_submodule(projection.post_norm)
            added = norm(self.written + added.to(self.written.dtype)) - norm(self.written)
        return added.to(self.hidden.dtype) * projection.scale


def resume_all(
    model: LoadedModel, examples: Sequence[Example], deltas: Deltas
) -> list[tuple[ResumedForward, list[Example]]]:
    """Return the examples behind the first edited MLP, in one piece where no later block has to be run.

    An answer of the model's own is not run where what the model held while it wrote it is all that is needed.
    """
    known = [example for example in examples if example.heard] if deltas.first == len(model.widths) - 1 else []
    taken = set(map(id, known))
    rest = [example for example in examples if id(example) not in taken]
    parts = [(resume(model, batch, deltas), rows) for batch, rows in batched(model, rest)]
    if known:
        parts.append((_recalled(model, known, deltas), known))
    if len(parts) < 2 or parts[0][0].later:
        return parts
    return [(joined([part for part, _ in parts]), [row for _, rows in parts for row in rows])]


def _recalled(model: LoadedModel, examples: Sequence[Example], deltas: Deltas) -> ResumedForward:
    """Return the tail of answers that the model wrote itself, of an edit of the last layer."""
    heard = [example.heard for example in examples if example.heard]
    units = deltas.units[deltas.first]
    hidden, written, after = _joined(heard)
    counts = torch.tensor([len(example.tokens) for example in examples], device=hidden.device)
    return ResumedForward(
        model=model,
        targets=torch.tensor([token for example in examples for token in example.tokens], device=hidden.device),
        rows=torch.repeat_interleave(counts),
        places=None,
        hidden=hidden,
        activation=torch.cat([one.activation[:, units].float() for one in heard]),
        written=written,
        later=(),
        after=after,
    )


def joined(parts: Sequence[ResumedForward]) -> ResumedForward:
    """Return tails without later blocks as one; rows are numbered through."""
    counts = accumulate((int(part.rows.max()) + 1 for part in parts), initial=0)
    hidden, written, after = _joined(parts)
    return replace(
        parts[0],
        targets=torch.cat([part.targets for part in parts]),
        rows=torch.cat([part.rows + count for part, count in zip(parts, counts, strict=False)]),
        hidden=hidden,
        activation=torch.cat([part.activation for part in parts]),
        written=written,
        after=after,
    )


def _joined(parts: Sequence[ResumedForward] | Sequence[GenerationCache]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what parts hold as `hidden`, `written` and `after`, each in one."""
    written = [part.written for part in parts if part.written is not None]
    # What was added to one part behind the last block may be nothing in another.
    after = [torch.zeros_like(part.hidden) if part.after is None else part.after for part in parts]
    return (
        torch.cat([part.hidden for part in parts]),
        torch.cat(written) if written else None,
        torch.cat(after) if any(part.after is not None for part in parts) else None,
    )


def batched(model: LoadedModel, examples: Sequence[Example]) -> list[tuple[Batch, list[Example]]]:
    """Return the examples as batches of like length, with the examples of each batch's rows."""
    ordered = sorted(examples, key=lambda example: (example.image is None, len(example.tokens)))
    found, start = [], 0
    for batch in batches(model, ordered):
        rows = len(batch.tokens)
        found.append((batch, ordered[start : start + rows]))
        start += rows
    return found


@torch.no_grad()
def resume(model: LoadedModel, batch: Batch, deltas: Deltas) -> ResumedForward:
    """Run the batch once, and keep what the deltas' layers need to be run again."""
    first = deltas.first
    projections = model.projections[first:]
    blocks = [block_of(model, layer) for layer in range(first, len(model.projections))]
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    left: dict[int, Tensor] = {}
    final: list[Tensor] = []
    activations: list[Tensor] = []
    written: list[Tensor] = []

    def enter(number: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given[number] = (arguments, named)

    def leave(number: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        left[number] = left_by(output)

    def receive(_: int, activation: Tensor, __: Tensor) -> None:
        activations.append(activation[:, deltas.units[first]].float())

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(partial(enter, number), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(leave, number)).remove)
        stack.enter_context(capture_activations(model.network, projections[:1], receive))
        if projections[0].post_norm is not None:
            norm = model.network.get_submodule(projections[0].post_norm)
            stack.enter_context(capture_input(norm, written.append))
        stack.enter_context(capture_input(model.norm, final.append))
        forward(model, batch)
    # Mllama leaves its cross-attention blocks out where there is no image: then nothing of theirs is written.
    ran = [number for number in sorted(left) if number > 0]
    hidden = left[0] if 0 in left else given[ran[0]][0][0]
    later = []
    for number in ran:
        later.append(_later(blocks[number], *given[number], hidden=left[max(n for n in left if n < number)]))
    starts = [row * batch.positions + start - 1 for row, start in enumerate(batch.caption_start)]
    places = torch.tensor(
        [start + index for start, tokens in zip(starts, batch.tokens, strict=True) for index in range(len(tokens))],
        device=hidden.device,
    )
    after = _added(final[-1], left[max(left)])
    if later:
        chosen: Any = slice(None)
    else:
        hidden, chosen = hidden.flatten(0, -2), places
        after = None if after is None else after.flatten(0, -2)[places]
    return ResumedForward(
        model=model,
        targets=torch.tensor([token for tokens in batch.tokens for token in tokens], device=hidden.device),
        rows=torch.tensor([row for row, tokens in enumerate(batch.tokens) for _ in tokens], device=hidden.device),
        places=places if later else None,
        hidden=hidden[chosen],
        activation=activations[0].view(*hidden.shape[:-1], -1)[chosen],
        written=written[0].view(hidden.shape)[chosen] if written else None,
        later=tuple(later),
        after=after,
    )


def _later(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], hidden: Tensor) -> _Later:
    """Describe a later block, whose predecessor left `hidden`."""
    hidden_named = "hidden_states" in named
    entered = named["hidden_states"] if hidden_named else arguments[0]
    # With its cache of keys and values a block would see the sequence twice.
    others = {name: value for name, value in named.items() if name != "hidden_states" and not isinstance(value, Cache)}
    return _Later(block, arguments if hidden_named else arguments[1:], others, hidden_named, _added(entered, hidden))


def _added(later: Tensor, earlier: Tensor) -> Tensor | None:
    """Return what was added between two blocks (Qwen3-VL adds image features there); None for nothing."""
    return None if later is earlier or torch.equal(later, earlier) else later - earlier
