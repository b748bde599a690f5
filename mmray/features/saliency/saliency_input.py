"""A batch looked at again: what it sees as a leaf of the graph, gradients of words in it, words without parts of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmray.detector.joint import JointModel
from mmray.errors import InputError
from mmray.models.blocks import block_of
from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_probability, token_logits
from mmray.models.patches import Patches, patches_of
from mmray.models.prompting import Batch
from mmray.neurons.token_positions import TokenPosition, rank_in_row

Seen = Float[Tensor, "row patch width"]
"""What stands for the images of a batch, and is differentiated in: a joint model's embedding, or the image tokens."""


class SaliencyInput(ABC):
    """A batch with the places in it whose words are asked about; `sizes` are its images', width and height in pixels.

    Raises InputError where an image's tokens are no grid in the sequence.
    """

    def __init__(
        self, model: LoadedModel, batch: Batch, places: Sequence[TokenPosition], sizes: Sequence[tuple[int, int]]
    ) -> None:
        self.model, self.batch, self.places, self.sizes = model, batch, places, sizes
        found = [patches_of(model, batch, row, size) for row, size in enumerate(sizes)]
        self.tokens: list[Patches] = [patches for patches in found if patches is not None]
        """Where in the sequence each row's image tokens stand, as a grid."""
        if len(self.tokens) < len(found):
            raise InputError(f"{model.name}: its image is no grid of tokens in the sequence, so there is no saliency")

    @cached_property
    @abstractmethod
    def seen(self) -> Seen:
        """What the rows see, outside any graph."""

    @abstractmethod
    def grid(self, row: int) -> Patches:
        """Return the grid of what a row sees; its positions are those of the patches in `seen`."""

    @abstractmethod
    def run(self, seen: Seen, **options: Any) -> Any:
        """Run the language model with this in place of the images, and return what it gives; `options` are its own."""

    def patches(self, seen: Seen, row: int) -> Float[Tensor, "patch width"]:
        """Return a row's patches, row by row of its grid; what belongs to no patch (CLS) is left out."""
        return seen[row, torch.tensor(self.grid(row).positions, device=seen.device)]

    @cached_property
    def gradients(self) -> list[Seen]:
        """The gradient of each place's logit in what its row sees.

        Rows don't depend on one another, so that one backward pass serves the first place of each, another the second.
        """
        found: dict[int, Seen] = {}
        turns = rank_in_row(self.places)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.seen.detach().clone().requires_grad_()
            logits = self._at_places(leaf, self.places, token_logits)
            for turn in sorted(set(turns)):
                members = [place for place, own in enumerate(turns) if own == turn]
                (gradient,) = torch.autograd.grad(logits[members].sum(), leaf, retain_graph=turn < max(turns))
                found |= dict.fromkeys(members, gradient)
        return [self.patches(found[place], own.row).float() for place, own in enumerate(self.places)]

    @torch.no_grad()
    def probabilities(self, seen: Seen, places: Sequence[TokenPosition]) -> Float[Tensor, " place"]:
        """Return the probability of each place's token where the rows see this instead."""
        return self._at_places(seen, places, log_probability).exp()

    def _at_places(
        self, seen: Seen, places: Sequence[TokenPosition], read: Callable[[LoadedModel, Tensor, Tensor], Tensor]
    ) -> Float[Tensor, " place"]:
        states: list[Tensor] = []
        with capture_input(self.model.norm, states.append):
            self.run(seen)
        rows = torch.tensor([place.row * self.batch.positions + place.position for place in places])
        hidden = states[0].reshape(-1, states[0].shape[-1])
        tokens = torch.tensor([place.token for place in places], dtype=torch.long)
        return read(self.model, hidden[rows.to(hidden.device)], tokens)


class JointInput(SaliencyInput):
    """A look through a joint model's sight."""

    def __init__(
        self,
        joint: JointModel,
        batch: Batch,
        places: Sequence[TokenPosition],
        pixels: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__(joint.model, batch, places, sizes)
        self.joint, self.pixels = joint, pixels

    @cached_property
    def seen(self) -> Seen:
        """The shared embedding."""
        return self.joint.embed(self.pixels)

    def grid(self, row: int) -> Patches:
        """Return the sight's grid."""
        sight = self.joint.tower
        positions = range(sight.skipped, sight.skipped + sight.side**2)
        return Patches(sight.side, sight.side, tuple(positions), sight.covers(self.sizes[row]))

    def run(self, seen: Seen, **options: Any) -> Any:
        """Run the language model on the embedding's image tokens."""
        return self.model.network(**self.joint.inputs(self.batch, seen), use_cache=False, logits_to_keep=1, **options)


class SequenceInput(SaliencyInput):
    """A look at the image tokens in the sequence, as they enter the first block: for any family that has them there."""

    @cached_property
    def seen(self) -> Seen:
        """What enters the first block."""
        entered: list[Tensor] = []
        with torch.no_grad(), capture_input(block_of(self.model, 0), entered.append):
            self._forward()
        return entered[0]

    def grid(self, row: int) -> Patches:
        """Return the grid of the row's image tokens."""
        return self.tokens[row]

    def run(self, seen: Seen, **options: Any) -> Any:
        """Run the network with this entering its first block."""

        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (seen, *arguments[1:])

        handle = block_of(self.model, 0).register_forward_pre_hook(replace)
        try:
            return self._forward(**options)
        finally:
            handle.remove()

    def _forward(self, **options: Any) -> Any:
        return self.model.network(**self.batch.to(self.model.device, self.model.network.dtype), **options)
