"""Record the last block while the model writes its own captions, so that no forward has to compute it again.

Greedy decoding visits each position once. What the last block and its MLP hold there is what a forward over the whole
caption gives. An edit of the last layer is learned from these records alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.models.blocks import block_of, block_output
from mmray.models.capture import capture_activations, capture_input
from mmray.models.families import habits_of
from mmray.models.loading import LoadedModel
from mmray.models.mlp_inputs import MlpInputs

UNRECORDED = ("prefill_chunk_size", "guidance_scale", "prompt_lookup_num_tokens", "cache_implementation")
"""Generation settings with which a forward is not of one token, or is compiled and calls no hooks."""


@dataclass(frozen=True)
class GenerationCache:
    """The last block where the model predicts each token of an answer, its end included."""

    hidden: Float[Tensor, "token hidden"]
    """The block's output."""
    activation: Float[Tensor, "token unit"]
    """Of all its neurons."""
    mlp_out: Float[Tensor, "token hidden"] | None
    """The MLP's output, if a norm follows it."""
    added_after: Float[Tensor, "token hidden"] | None
    """What is added between the block and the final norm."""
    entered: Float[Tensor, "token hidden"] | None
    """What its neurons read, where `MlpInputs` knows the rows that read it."""


@dataclass
class GenerationRecorder:
    """Records of a batch of answers: the last position of each forward, row by row."""

    hidden: list[Tensor] = field(default_factory=list)
    activation: list[Tensor] = field(default_factory=list)
    mlp_out: list[Tensor] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)
    """Inputs of the final norm."""
    entered: list[Tensor] = field(default_factory=list)

    def of(self, row: int, tokens: int) -> GenerationCache | None:
        """Return the record of a row's first tokens; None if not all of them were recorded."""
        # Also where nothing is recorded at all, as for the models that `record_generation` leaves out.
        if tokens > min(len(self.hidden), len(self.final)):
            return None
        hidden, activation, mlp_out, final, entered = (
            torch.stack([step[row] for step in steps[:tokens]]) if steps else None
            for steps in (self.hidden, self.activation, self.mlp_out, self.final, self.entered)
        )
        assert hidden is not None and activation is not None and final is not None
        added_after = None if torch.equal(hidden, final) else final - hidden
        return GenerationCache(hidden, activation, mlp_out, added_after, entered)


@contextmanager
def record_generation(model: LoadedModel) -> Iterator[GenerationRecorder]:
    """Record the last block at the last position of each forward inside the `with` block.

    Nothing is recorded for encoder-decoders, which may write special tokens first, for routed experts, whose neurons
    are too many to keep, for decoders of several streams, for families whose prompts may have to be answered one by
    one, and under generation settings in `UNRECORDED`.
    """
    recorder = GenerationRecorder()
    layer = len(model.widths) - 1
    projection = model.projections[layer]
    unrecorded = any(getattr(model.network.generation_config, name, None) for name in UNRECORDED)
    unrecorded |= model.parts.encoder_decoder or habits_of(model.network.config).rewrites_prompt
    if unrecorded or projection.experts or model.streams is not None:
        yield recorder
        return
    activations: list[Tensor] = []
    mlp_outs: list[Tensor] = []
    entered: list[Tensor] = []
    inputs = MlpInputs.of(model.network, projection)

    def record(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        # A block's hook fires after those of its MLP, whose records are waiting to be popped.
        hidden = block_output(output)
        # Clones: a view would keep the tensors of all prompt positions in memory.
        recorder.hidden.append(hidden[:, -1].clone())
        # Some MLPs see rows and positions flattened into one dimension.
        recorder.activation.append(activations.pop().view(*hidden.shape[:-1], -1)[:, -1].clone())
        if mlp_outs:
            recorder.mlp_out.append(mlp_outs.pop().view(hidden.shape)[:, -1].clone())
        if entered:
            recorder.entered.append(entered.pop().view(hidden.shape)[:, -1].clone())

    with ExitStack() as stack:
        stack.callback(block_of(model, layer).register_forward_hook(record).remove)
        stack.enter_context(
            capture_activations(model.network, [projection], lambda _, activation, __: activations.append(activation))
        )
        if projection.post_norm is not None:
            stack.enter_context(capture_input(model.network.get_submodule(projection.post_norm), mlp_outs.append))
        if inputs is not None:
            stack.enter_context(capture_input(inputs.reader, entered.append))
        stack.enter_context(capture_input(model.norm, lambda states: recorder.final.append(states[:, -1].clone())))
        yield recorder
