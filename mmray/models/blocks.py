"""The decoder's blocks: entered in the middle with known states, or with the image's patches in another order.

Neurons that are changed leave their own block as it is up to what its MLP writes, so that the way begins there. The
last block's MLP, three quarters of an ordinary block, treats each position by itself: it is computed where it is
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch


def block_of(model: LoadedModel, layer: int) -> nn.Module:
    """Return the decoder's block that holds a layer's MLP: the module numbered by the layer in its path."""
    path = re.match(rf".*?\.{layer}(?=\.)", model.projections[layer].path)
    assert path, model.projections[layer].path
    block: nn.Module = model.network.get_submodule(path.group())
    return block


class BlockRecorder:
    """What went through the decoder's blocks in a forward, and the way from any MLP to the end once more."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.blocks = [block_of(model, layer) for layer in range(len(model.widths))]
        self.entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.left: list[Tensor] = []
        """What left each block."""
        self.written: list[tuple[Tensor, Tensor]] = []
        """What entered each MLP's output projection, and what it wrote."""
        self.end = torch.zeros(0)
        """What entered the final norm."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what goes through the blocks while the block runs one forward."""
        self.entered, self.left, self.written = [], [], []

        def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.entered.append((arguments, named))

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.left.append(left_by(output))

        def write(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            self.written.append((arguments[0], output))

        def keep_end(states: Tensor) -> None:
            self.end = states

        with ExitStack() as stack:
            stack.enter_context(capture_input(self.model.norm, keep_end))
            for block, projection in zip(self.blocks, self.model.projections, strict=False):
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
                module = self.model.network.get_submodule(projection.path)
                stack.callback(module.register_forward_hook(write).remove)
            yield

    def again(self, first: int, read: Int[Tensor, " place"]) -> Float[Tensor, "place hidden"]:
        """Return what leaves the last block at the places that are read, when it all runs again from a layer's MLP on.

        `read` are indices in (row, position). The result is the input of the final norm where nothing happens between
        the blocks; whoever uses it proves that first.
        """
        read = read.to(self.end.device)
        with self._narrowed(read):
            states = self._rewritten(first)
            for block, (arguments, named) in zip(self.blocks[first + 1 :], self.entered[first + 1 :], strict=True):
                states = left_by(block(states, *arguments[1:], **named))
        return states.flatten(0, -2)[read]

    def _rewritten(self, layer: int) -> Float[Tensor, "row position hidden"]:
        """Return what leaves a block when its MLP's output projection runs again."""
        projection = self.model.projections[layer]
        if projection.experts:
            # How tokens are routed is not among what went into the module's first argument.
            arguments, named = self.entered[layer]
            return left_by(self.blocks[layer](*arguments, **named))
        activation, before = self.written[layer]
        after = self.model.network.get_submodule(projection.path)(activation)
        if projection.post_norm is not None:
            norm = self.model.network.get_submodule(projection.post_norm)
            before, after = norm(before), norm(after)
        left = self.left[layer]
        rewritten: Tensor = left + projection.scale * (after - before).reshape(left.shape)
        return rewritten

    @contextmanager
    def _narrowed(self, read: Int[Tensor, " place"]) -> Iterator[None]:
        """Compute the last block's MLP at these places alone; elsewhere it writes zero."""
        last = self.model.projections[len(self.blocks) - 1].path
        mlp = self.model.network.get_submodule(last.rpartition(".")[0])
        shapes: list[torch.Size] = []

        def narrow(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            shapes.append(arguments[0].shape)
            return (arguments[0].flatten(0, -2)[read][None], *arguments[1:])

        def widen(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            wide = output.new_zeros(shapes.pop())
            wide.flatten(0, -2)[read] = output[0]
            return wide

        with ExitStack() as stack:
            # OPT's has no module of its own.
            if mlp is not self.blocks[-1]:
                stack.callback(mlp.register_forward_pre_hook(narrow).remove)
                stack.callback(mlp.register_forward_hook(widen).remove)
            yield


def left_by(output: Any) -> Tensor:
    """Return the hidden states in what a block returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def permuted_image(model: LoadedModel, batch: Batch, seed: int = 0) -> Iterator[None]:
    """Put the image's tokens in a random order, after the projector and before the first block (Pan et al. 2024).

    Where positions are added to the embeddings (OPT), they move with the patches; where they are within attention they
    stay, and so patches are seen in other places. The image has to be in the decoder's sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(batch.tokens) * batch.positions)
    for row in range(len(batch.tokens)):
        spans = [range(run.start, run.stop) for run in batch.runs if run.row == row and run.modality == "image"]
        places = torch.tensor([position for span in spans for position in span], dtype=torch.long)
        places += row * batch.positions
        order[places] = places[torch.randperm(len(places), generator=generator)]

    def replace(_: nn.Module, arguments: tuple[object, ...]) -> tuple[object, ...]:
        states = arguments[0]
        assert isinstance(states, Tensor)
        moved = states.flatten(0, 1)[order.to(states.device)].reshape(states.shape)
        return (moved, *arguments[1:])

    handle = block_of(model, 0).register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()
