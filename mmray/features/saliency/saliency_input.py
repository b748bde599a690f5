"""A batch whose visual features can be differentiated in and changed, with the tokens to explain in it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from mmray.detector.joint import JointModel
from mmray.errors import InputError
from mmray.models.blocks import block_of
from mmray.models.capture import capture_input
from mmray.models.loading import LoadedModel
from mmray.models.norms import log_probability, token_logits
from mmray.models.patches import Patches, patches_of
from mmray.models.prompting import Batch, encode, prefix_before, prompt_text, tokenize_caption
from mmray.models.streams import by_token, in_streams
from mmray.neurons.concepts import Mention, find_forms
from mmray.neurons.token_positions import TokenPosition, locate_mentions, rank_in_row

Features = Float[Tensor, "row patch width"]
"""What stands for the images of a batch: a joint model's embedding, or the sequence with its image tokens."""


class SaliencyInput(ABC):
    """A batch with the positions of the tokens to explain; `sizes` are its images', width and height in pixels.

    Raises InputError where an image's tokens are no grid in the sequence.
    """

    def __init__(
        self, model: LoadedModel, batch: Batch, targets: Sequence[TokenPosition], sizes: Sequence[tuple[int, int]]
    ) -> None:
        self.model, self.batch, self.targets, self.sizes = model, batch, targets, sizes
        found = [patches_of(model, batch, row, size) for row, size in enumerate(sizes)]
        self.tokens: list[Patches] = [patches for patches in found if patches is not None]
        """Each row's image tokens in the sequence, as a grid."""
        if len(self.tokens) < len(found):
            raise InputError(f"{model.name}: its image tokens are no grid in the sequence, so there is no saliency")

    @cached_property
    @abstractmethod
    def features(self) -> Features:
        """The features of the batch, outside any graph."""

    @abstractmethod
    def grid(self, row: int) -> Patches:
        """Return the patch grid of a row; its positions are those of the patches in `features`."""

    @abstractmethod
    def run(self, features: Features, **options: Any) -> Any:
        """Run the language model with these features, and return its output; `options` are those of its forward."""

    def patches(self, features: Features, row: int) -> Float[Tensor, "patch width"]:
        """Return a row's patches, row by row of its grid, without other positions (CLS, text)."""
        return features[row, torch.tensor(self.grid(row).positions, device=features.device)]

    @cached_property
    def gradients(self) -> list[Float[Tensor, "patch width"]]:
        """The gradient of each target's logit with respect to its row's patches."""
        found: dict[int, Features] = {}
        ranks = rank_in_row(self.targets)
        with torch.inference_mode(False), torch.enable_grad():
            # Features may be inference tensors, which can't be in a graph: hence the clone outside inference mode.
            leaf = self.features.detach().clone().requires_grad_()
            logits = self.at_targets(leaf, self.targets, token_logits)
            # Rows don't depend on each other: one backward pass serves the first target of every row, a second one
            # the second targets, and so on.
            for rank in sorted(set(ranks)):
                members = [index for index, own in enumerate(ranks) if own == rank]
                # The last pass frees the graph, which holds the activations of the whole network.
                (gradient,) = torch.autograd.grad(logits[members].sum(), leaf, retain_graph=rank < max(ranks))
                found |= dict.fromkeys(members, gradient)
        return [self.patches(found[index], target.row).float() for index, target in enumerate(self.targets)]

    @torch.no_grad()
    def probabilities(self, features: Features, targets: Sequence[TokenPosition]) -> Float[Tensor, " target"]:
        """Return the probability of each target's token with these features."""
        return self.at_targets(features, targets, log_probability).exp()

    def at_targets(
        self,
        features: Features,
        targets: Sequence[TokenPosition],
        read: Callable[[LoadedModel, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, " target"]:
        """Return what `read` makes of each target's state before the final norm and its token."""
        # Only the targets are projected onto the vocabulary: the logits of all positions would not fit in memory.
        states: list[Tensor] = []
        with capture_input(self.model.norm, states.append):
            self.run(features)
        # Rows are padded to one length, so a flat index finds each target.
        rows = torch.tensor([target.row * self.batch.positions + target.position for target in targets])
        hidden = states[0].reshape(-1, states[0].shape[-1])
        tokens = torch.tensor([target.token for target in targets], dtype=torch.long)
        return read(self.model, hidden[rows.to(hidden.device)], tokens)


class JointInput(SaliencyInput):
    """The features are a joint model's embedding, which its detector reads too."""

    def __init__(
        self,
        joint: JointModel,
        batch: Batch,
        targets: Sequence[TokenPosition],
        pixels: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__(joint.model, batch, targets, sizes)
        self.joint, self.pixels = joint, pixels

    @cached_property
    def features(self) -> Features:
        """The shared embedding."""
        return self.joint.embed(self.pixels)

    def grid(self, row: int) -> Patches:
        """Return the tower's grid."""
        tower = self.joint.tower
        positions = range(tower.skipped, tower.skipped + tower.side**2)
        return Patches(tower.side, tower.side, tuple(positions), tower.covers(self.sizes[row]))

    def run(self, features: Features, **options: Any) -> Any:
        """Run the language model on the embedding's image tokens."""
        inputs = self.joint.inputs(self.batch, features)
        # The logits are not used, so a single position is enough: all of them would be the largest tensor.
        return self.model.network(**inputs, use_cache=False, logits_to_keep=1, **options)


class SequenceInput(SaliencyInput):
    """The features are the first block's input, for any family with image tokens in the sequence."""

    @cached_property
    def features(self) -> Features:
        """The first block's input."""
        captured: list[Tensor] = []
        with torch.no_grad(), capture_input(block_of(self.model, 0), captured.append):
            self._forward()
        return by_token(captured[0])

    def grid(self, row: int) -> Patches:
        """Return the grid of the row's image tokens."""
        return self.tokens[row]

    def run(self, features: Features, **options: Any) -> Any:
        """Run the network with these features as its first block's input."""

        def replace(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (in_streams(features, arguments[0]), *arguments[1:])

        # Replaced there rather than as inputs_embeds: families differ in how they merge image tokens and positions.
        handle = block_of(self.model, 0).register_forward_pre_hook(replace)
        try:
            return self._forward(**options)
        finally:
            handle.remove()

    def _forward(self, **options: Any) -> Any:
        return self.model.network(**self.batch.to(self.model.device, self.model.network.dtype), **options)


def open_input(
    model: LoadedModel,
    joint: JointModel | None,
    batch: Batch,
    targets: Sequence[TokenPosition],
    images: Sequence[Image],
) -> SaliencyInput:
    """Return the input on the joint model's embedding where there is one, else on image tokens in the sequence."""
    sizes = [image.size for image in images]
    if joint is None:
        return SequenceInput(model, batch, targets, sizes)
    return JointInput(joint, batch, targets, joint.pixels(images), sizes)


def target_of(
    model: LoadedModel,
    image: Image,
    caption: str,
    word: str,
    *,
    prompt: str | None = None,
    prefix: str | None = None,
    language: str | None = None,
) -> tuple[Batch, list[TokenPosition]]:
    """Return a batch of one row, and the position that predicts the first token of the word's first mention."""
    mention = mentions_of(caption, word, language)[0]
    text = prompt_text(model, prompt, language, prefix=prefix_before(caption, prefix))
    tokens, offsets = tokenize_caption(model, text, caption)
    batch = encode(model, [text], [image], [tokens], [offsets])
    return batch, locate_mentions(batch, 0, "", [mention])


def mentions_of(caption: str, word: str, language: str | None = None) -> list[Mention]:
    """Return where a caption has a word: a noun in any of its forms, any other word as it is spelt.

    Raises InputError where it does not have it.
    """
    form = word.strip().casefold()
    found = find_forms(caption, frozenset({form}), language) if form else []
    if form and not found:
        # Not \b: after a word such as C++ it would want a letter.
        spelt = re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", caption, re.IGNORECASE)
        found = [Mention(form, match.start(), match.end()) for match in spelt]
    if not found:
        raise InputError(f"the caption {caption!r} does not say {word!r}; give one that does, true or not")
    return found
