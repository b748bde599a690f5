"""The decoder's blocks: entered in the middle with known states, or with the image's patches in another order.

Of the last block's MLP, which treats each position by itself, only what is read afterwards is computed: it is three
quarters of a block of an ordinary decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmray.models.capture import tap_input
from mmray.models.loading import LoadedModel
from mmray.models.prompting import Batch


def block_of(model: LoadedModel, layer: int) -> nn.Module:
    """Return the decoder's block that holds a layer's MLP: the module numbered by the layer in its path."""
    path = re.match(rf".*?\.{layer}(?=\.)", model.projections[layer].path)
    assert path, model.projections[layer].path
    block: nn.Module = model.network.get_submodule(path.group())
    return block


class Passage:
    """What entered each of the decoder's blocks in a forward, and the way from any of them to the end once more."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.blocks = [block_of(model, layer) for layer in range(len(model.widths))]
        self.entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.end = torch.zeros(0)
        """What entered the final norm."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what enters the blocks and the final norm while the block runs one forward."""
        self.entered = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.entered.append((arguments, named))

        def keep_end(states: Tensor) -> None:
            self.end = states

        with ExitStack() as stack:
            stack.enter_context(tap_input(self.model.norm, keep_end))
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            yield

    def again(self, first: int, read: Int[Tensor, " place"]) -> Float[Tensor, "place hidden"]:
        """Return what leaves the last block at the places that are read, when the blocks from `first` on run again.

        `read` are indices in (row, position). The result is the input of the final norm where nothing happens between
        the blocks; whoever uses it proves that first.
        """
        states = self.entered[first][0][0]
        with self._narrowed(read.to(states.device)):
            for block, (arguments, named) in zip(self.blocks[first:], self.entered[first:], strict=True):
                left = block(states, *arguments[1:], **named)
                states = left[0] if isinstance(left, tuple) else left
        end: Tensor = states.flatten(0, -2)[read.to(states.device)]
        return end

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


@contextmanager
def permuted_image(model: LoadedModel, batch: Batch, seed: int = 0) -> Iterator[None]:
    """Put the image's tokens in a random order, after the projector and before the first block (Pan et al. 2024).

    Where positions are added to the embeddings (OPT), they move with the patches; where they are within attention they
    stay, and so patches are seen in other places.
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
