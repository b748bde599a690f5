"""The model of a served run: heat maps of any neurons, and captions before and after neurons are changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image

from mmray.errors import InputError
from mmray.features.editing.edit import open_edit
from mmray.models.capture import capture_input
from mmray.models.generation import caption_of, generate, token_text
from mmray.models.interventions import scale
from mmray.models.norms import vocabulary_logits
from mmray.models.prompting import encode, prompt_text
from mmray.neurons.activation_cache import forward
from mmray.neurons.model import AnyImage, NeuronModel, load_model, open_image
from mmray.report.section import map_of

LONGEST = 48
"""Most tokens of a caption."""
LIKELIEST = 5
"""Tokens listed at each position."""


class Playground:
    """A model, and the edits that can be tried on it by name."""

    def __init__(self, name: str, edits: Mapping[str, str]) -> None:
        self.model: NeuronModel = load_model(name)
        self.edits = {key: open_edit(uri) for key, uri in edits.items()}
        # Changes are hooks in the network, so requests take turns.
        self._turn = threading.Lock()

    def heat_map(self, image: AnyImage, neurons: Sequence[str], signs: Sequence[float] | None = None) -> dict[str, Any]:
        """Return these neurons' mean activation over the image's patches, as the report's pages take it."""
        with self._turn:
            values, covers = self.model.patch_map(image, neurons, signs=signs)
        rows, columns = values.shape
        return map_of({"rows": rows, "columns": columns, "values": values.flatten(), "covers": [*covers], "hit": None})

    def compare(
        self,
        image: AnyImage,
        *,
        prompt: str | None = None,
        neurons: Sequence[str] = (),
        factor: float = 0.0,
        edit: str | None = None,
    ) -> dict[str, Any]:
        """Return the model's captions before and after, each with the probabilities of its tokens before and after.

        The change is an edit by name, or scaling these neurons' activations by `factor`. Raises InputError for an
        unknown edit or neuron, and if neither is given.
        """
        if edit is None and not neurons:
            raise InputError("nothing to change: give neurons such as L7.u89, or choose an edit")
        opened = open_image(image)
        assert opened is not None
        question = prompt_text(self.model, prompt or None, None)
        with self._turn:
            before = self._caption(question, opened)
            with self._changed(neurons, factor, edit):
                after = self._caption(question, opened)
                # Both captions under both models: where they part, each has tokens that the other model did not write.
                changed = [self._chances(question, opened, tokens) for tokens in (before, after)]
            unchanged = [self._chances(question, opened, tokens) for tokens in (before, after)]
        pages = [
            self._page(tokens, *chances)
            for tokens, chances in zip((before, after), zip(unchanged, changed, strict=True), strict=True)
        ]
        return {"before": pages[0], "after": pages[1]}

    @contextmanager
    def _changed(self, neurons: Sequence[str], factor: float, edit: str | None) -> Iterator[None]:
        if edit is None:
            with scale(self.model, neurons, factor):
                yield
            return
        if edit not in self.edits:
            raise InputError(f"no edit {edit!r}; there are {', '.join(self.edits) or 'none'}")
        with self.edits[edit].applied(self.model):
            yield

    def _caption(self, question: str, image: Image) -> list[int]:
        return generate(self.model, [question], [image], LONGEST)[0]

    @torch.inference_mode()
    def _chances(self, question: str, image: Image, tokens: list[int]) -> torch.Tensor:
        """Return the probabilities of all tokens at each position of a caption, `(token, vocabulary)`."""
        if not tokens:
            return torch.zeros(0, 0)
        # Offsets align tokens with words, which probabilities don't need.
        batch = encode(self.model, [question], [image], [tokens], [[(0, 0)] * len(tokens)])
        final: list[torch.Tensor] = []
        with capture_input(self.model.norm, final.append):
            forward(self.model, batch)
        start = batch.caption_start[0]
        # A token is predicted one position earlier.
        rows = [batch.flat(0, position) for position in range(start - 1, start - 1 + len(tokens))]
        return vocabulary_logits(self.model, final[-1].flatten(0, -2)[rows]).softmax(dim=1).cpu()

    def _page(self, tokens: list[int], before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
        """Return a caption with each token's probability before and after, and the likeliest tokens of both."""
        return {
            "caption": caption_of(self.model, tokens)[0],
            "tokens": [
                {
                    "text": token_text(self.model, token),
                    "before": float(before[place, token]),
                    "after": float(after[place, token]),
                    "likeliest_before": self._likeliest(before[place]),
                    "likeliest_after": self._likeliest(after[place]),
                }
                for place, token in enumerate(tokens)
            ],
        }

    def _likeliest(self, chances: torch.Tensor) -> list[tuple[str, float]]:
        best = chances.topk(LIKELIEST)
        return [
            (token_text(self.model, token), chance)
            for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
