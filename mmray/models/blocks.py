"""The decoder's blocks: record one forward, then run the later blocks again with other hidden states.

A change of neurons leaves the blocks before them as they are, and their own block up to the output of its MLP. So a
forward with changed neurons can resume there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch
from mmray.models.streams import by_token, in_streams


def block_of(model: LoadedModel, layer: int) -> nn.Module:
    """Return the decoder block that holds a layer's MLP: the module numbered by the layer in its path."""
    # The shallowest module whose name is the layer's number: the block, not a layer inside it.
    path = re.match(rf".*?\.{layer}(?=\.)", model.projections[layer].path)
    assert path, model.projections[layer].path
    block: nn.Module = model.network.get_submodule(path.group())
    return block


def block_output(output: Any) -> Tensor:
    """Return the hidden states in what a block returned: older families return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass(frozen=True)
class BlockCall:
    """A recorded call of one block, to repeat with other hidden states."""

    block: nn.Module
    arguments: tuple[Any, ...]
    """Without the hidden states, which come first or by name."""
    named: dict[str, Any]
    hidden_named: bool
    added: Tensor | None
    """What was added to the hidden states since the block before (Qwen3-VL adds image features); None: nothing."""

    def run(self, hidden: Tensor) -> Tensor:
        """Return the block's output for these hidden states, which left the block before."""
        if self.added is not None:
            hidden = hidden + self.added
        if self.hidden_named:
            return block_output(self.block(*self.arguments, hidden_states=hidden, **self.named))
        return block_output(self.block(hidden, *self.arguments, **self.named))


class BlockRecorder:
    """Inputs and outputs of the decoder's blocks in one forward, from block `first` on.

    Mllama skips its cross-attention blocks without an image; skipped blocks have no entries.
    """

    def __init__(self, model: LoadedModel, first: int = 0) -> None:
        self.model = model
        self.blocks = {layer: block_of(model, layer) for layer in range(first, len(model.widths))}
        self.inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: dict[int, Tensor] = {}
        self.mlps: dict[int, tuple[Tensor, Tensor]] = {}
        """Input and output of each MLP's output projection."""
        self.final = torch.zeros(0)
        """Input of the final norm."""
        self._calls: dict[int, BlockCall] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record one forward, run inside the `with` block."""
        self.inputs, self.outputs, self.mlps, self._calls = {}, {}, {}, {}

        def enter(layer: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.inputs[layer] = arguments, named

        def leave(layer: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.outputs[layer] = block_output(output)

        def project(layer: int, _: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            self.mlps[layer] = arguments[0], output

        def keep_final(states: Tensor) -> None:
            self.final = states

        with ExitStack() as stack:
            stack.enter_context(capture_input(self.model.norm, keep_final))
            for layer, block in self.blocks.items():
                stack.enter_context(block.register_forward_pre_hook(partial(enter, layer), with_kwargs=True))
                stack.enter_context(block.register_forward_hook(partial(leave, layer)))
                module = self.model.network.get_submodule(self.model.projections[layer].path)
                stack.enter_context(module.register_forward_hook(partial(project, layer)))
            yield
        # Once, and not at each resumption: comparing hidden states waits for the GPU.
        before: Tensor | None = None
        for layer in sorted(self.outputs):
            self._calls[layer] = self._call(layer, before)
            before = self.outputs[layer]

    def _call(self, layer: int, before: Tensor | None) -> BlockCall:
        arguments, named = self.inputs[layer]
        # With its cache of keys and values a block would see the sequence twice.
        named = {name: value for name, value in named.items() if not isinstance(value, Cache)}
        hidden_named = "hidden_states" in named
        hidden = named.pop("hidden_states") if hidden_named else arguments[0]
        added = None if before is None else difference(hidden, before)
        return BlockCall(self.blocks[layer], arguments if hidden_named else arguments[1:], named, hidden_named, added)

    def calls(self, after: int) -> list[BlockCall]:
        """Return the calls of the blocks after a layer's that ran, in order."""
        return [call for layer, call in self._calls.items() if layer > after]

    @property
    def plain(self) -> bool:
        """Whether every block's input is the output of the block before, and the final norm's that of the last."""
        unchanged = all(call.added is None for call in self._calls.values())
        return unchanged and difference(self.final, self.outputs[max(self.outputs)]) is None

    def resume(self, first: int, read: Int[Tensor, " position"]) -> Float[Tensor, "position hidden"]:
        """Run everything again from a layer's MLP output on; return what leaves the last block at some positions.

        `read` indexes (row, position), flattened. The result is the input of the final norm if the recording is
        `plain`.
        """
        read = read.to(self.final.device)
        with self._last_mlp_at(read):
            hidden = self._output_again(first)
            for call in self.calls(first):
                hidden = call.run(hidden)
        return hidden.flatten(0, -2)[read]

    def _output_again(self, layer: int) -> Float[Tensor, "row position hidden"]:
        """Return a block's output with its MLP's output projection run again."""
        projection = self.model.projections[layer]
        if projection.experts or not projection.ends_block:
            # The module's first argument does not hold the routing; or more follows. So the whole block runs again.
            arguments, named = self.inputs[layer]
            return block_output(self.blocks[layer](*arguments, **named))
        activation, old = self.mlps[layer]
        new = self.model.network.get_submodule(projection.path)(activation)
        if projection.post_norm is not None:
            norm = self.model.network.get_submodule(projection.post_norm)
            old, new = norm(old), norm(new)
        output = self.outputs[layer]
        changed: Tensor = output + projection.scale * (new - old).reshape(output.shape)
        return changed

    @contextmanager
    def _last_mlp_at(self, read: Int[Tensor, " position"]) -> Iterator[None]:
        """Compute the last block's MLP only at these positions; elsewhere it writes zero.

        An MLP sees each position alone, and after the last block nothing mixes positions. The MLP is three quarters of
        a block's work.
        """
        last = max(self.blocks)
        mlp = self.model.network.get_submodule(self.model.projections[last].path.rpartition(".")[0])
        shapes: list[torch.Size] = []

        def narrow(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            shapes.append(arguments[0].shape)
            # BLOOM's MLP also gets what it adds its output to.
            alike = [isinstance(part, Tensor) and part.shape == arguments[0].shape for part in arguments]
            return tuple(
                part.flatten(0, -2)[read][None] if narrowed else part
                for part, narrowed in zip(arguments, alike, strict=True)
            )

        def widen(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            wide = output.new_zeros(shapes.pop())
            wide.flatten(0, -2)[read] = output[0]
            return wide

        with ExitStack() as stack:
            # OPT's projection hangs in the block itself, without a module for the MLP.
            if mlp is not self.blocks[last]:
                stack.enter_context(mlp.register_forward_pre_hook(narrow))
                stack.enter_context(mlp.register_forward_hook(widen))
            yield


def difference(later: Tensor, earlier: Tensor) -> Tensor | None:
    """Return what was added between two points of the residual stream; None for nothing."""
    return None if later is earlier or torch.equal(later, earlier) else later - earlier


@contextmanager
def permuted_image(model: LoadedModel, batch: Batch, seed: int = 0) -> Iterator[None]:
    """Shuffle the image tokens after the projector and before the first block (Pan et al. 2024).

    Positions that are added to the embeddings (OPT) move with the patches. Positions inside attention stay, so patches
    are seen in other places. The image must be in the decoder's sequence. Images of the same size get the same order.
    """
    images = [batch.image_positions(row) for row in range(len(batch.tokens))]
    with _shuffled(model, images, batch.positions, seed):
        yield


@contextmanager
def permuted_prompt_image(model: LoadedModel, prompts: Batch, seed: int = 0) -> Iterator[None]:
    """Shuffle the image tokens of prompts in the same order while `generate` reads them; `prompts` has no captions."""
    # Generation pads on the left of the text.
    shifts = [0 if model.parts.image_before else prompts.positions - length for length in prompts.caption_start]
    images = [[at + shift for at in prompts.image_positions(row)] for row, shift in enumerate(shifts)]
    with _shuffled(model, images, prompts.positions, seed):
        yield


@contextmanager
def _shuffled(model: LoadedModel, images: Sequence[Sequence[int]], positions: int, seed: int) -> Iterator[None]:
    """Shuffle these positions of each row before the first block, in forwards over so many positions."""
    order = torch.arange(len(images) * positions)
    for row, places in enumerate(images):
        image = torch.tensor(places, dtype=torch.long) + row * positions
        # A generator per image: what shares the batch must not change the order.
        order[image] = image[torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))]

    def shuffle(_: nn.Module, arguments: tuple[object, ...]) -> tuple[object, ...] | None:
        states = arguments[0]
        assert isinstance(states, Tensor)
        tokens = by_token(states)
        # After the prompt, generation goes on one position at a time.
        if tokens.shape[1] != positions:
            return None
        shuffled = tokens.flatten(0, 1)[order.to(states.device)].reshape(tokens.shape)
        return (in_streams(shuffled, states), *arguments[1:])

    with block_of(model, 0).register_forward_pre_hook(shuffle):
        yield
