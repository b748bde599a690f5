"""What the last block holds while the model writes its own captions, so that no forward has to find it out again.

A greedy caption is written place by place; what the last block leaves and its MLP holds at each is what a forward of
the whole caption gives there. An edit of the last layer is learnt on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.models.blocks import block_of, left_by
from mmray.models.capture import capture_activations, capture_input
from mmray.models.loading import LoadedModel

SPLIT = ("prefill_chunk_size", "guidance_scale", "prompt_lookup_num_tokens", "cache_implementation")
"""Settings of generation with which a forward is not of one token, or is compiled and calls no hooks."""


@dataclass(frozen=True)
class GenerationCache:
    """The last block where the model predicts each token of an answer, end included."""

    hidden: Float[Tensor, "token hidden"]
    """What leaves it."""
    activation: Float[Tensor, "token unit"]
    """Of all its neurons."""
    written: Float[Tensor, "token hidden"] | None
    """What its MLP writes, where a norm stands behind it."""
    after: Float[Tensor, "token hidden"] | None
    """What is added between it and the final norm."""


@dataclass
class GenerationRecorder:
    """What was heard of a batch of answers: of each forward, its last position, row by row."""

    hidden: list[Tensor] = field(default_factory=list)
    activation: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    """What enters the final norm."""

    def of(self, row: int, tokens: int) -> GenerationCache | None:
        """Return what was heard of a row's first tokens; None where not all of them were."""
        if tokens > min(len(self.hidden), len(self.normed)):
            return None
        hidden, activation, written, normed = (
            torch.stack([step[row] for step in steps[:tokens]]) if steps else None
            for steps in (self.hidden, self.activation, self.written, self.normed)
        )
        assert hidden is not None and activation is not None and normed is not None
        return GenerationCache(hidden, activation, written, None if torch.equal(hidden, normed) else normed - hidden)


@contextmanager
def record_generation(model: LoadedModel) -> Iterator[GenerationRecorder]:
    """Hear what the last block holds at the last position of each forward while the block lasts.

    Nothing is heard of encoder-decoders, which may write special tokens first, of routed experts, whose neurons are too
    many to keep, and of models whose settings of generation are among `SPLIT`.
    """
    heard = GenerationRecorder()
    layer = len(model.widths) - 1
    projection = model.projections[layer]
    split = any(getattr(model.network.generation_config, name, None) for name in SPLIT)
    if model.parts.encoder_decoder or projection.experts or split:
        yield heard
        return
    rows: list[Tensor] = []
    written: list[Tensor] = []

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        left = left_by(output)
        # Copies: a view would hold on to all positions of the prompt.
        heard.hidden.append(left[:, -1].clone())
        # MLPs may see the rows' positions in one line.
        heard.activation.append(rows.pop().view(*left.shape[:-1], -1)[:, -1].clone())
        if written:
            heard.written.append(written.pop().view(left.shape)[:, -1].clone())

    with ExitStack() as stack:
        stack.callback(block_of(model, layer).register_forward_hook(leave).remove)
        stack.enter_context(
            capture_activations(model.network, [projection], lambda _, activation, __: rows.append(activation))
        )
        if projection.post_norm is not None:
            stack.enter_context(capture_input(model.network.get_submodule(projection.post_norm), written.append))
        stack.enter_context(capture_input(model.norm, lambda states: heard.normed.append(states[:, -1].clone())))
        yield heard
