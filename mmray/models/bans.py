"""Ban words while a model writes: their token sequences, and the scores without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.models.loading import LoadedModel


def banned_tokens(model: LoadedModel, words: Sequence[str]) -> list[list[int]]:
    """Return the words' token ids within a sentence, at its start, and as English plurals."""
    # The spelling after a blank comes first, because closed forms take that one alone.
    spellings = [form for word in words for form in (f" {word}", word, f" {word}s")]
    found = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in spellings]
    return [list(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]


class RowBans:
    """A logits processor of `generate` by which each row may not write its own token sequences."""

    def __init__(self, banned: Sequence[Sequence[list[int]]]) -> None:
        self.banned = banned

    def __call__(
        self, input_ids: Int[Tensor, "row position"], scores: Float[Tensor, "row token"]
    ) -> Float[Tensor, "row token"]:
        """Return the scores, −∞ for the last token of a sequence whose others are already written.

        Views of images are further rows, in the same order, with the same bans.
        """
        scores = scores.clone()
        for row, written in enumerate(input_ids.tolist()):
            for *before, last in self.banned[row % len(self.banned)]:
                if not before or written[-len(before) :] == before:
                    scores[row, last] = -torch.inf
        return scores
