"""Where in a batch concepts are predicted: from characters of the caption to positions of the sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmray.models.prompting import Batch
from mmray.neurons.concepts import Mention


@dataclass(frozen=True)
class TokenPosition:
    """One occurrence of a concept in a batch: the position whose output predicts the token, and the token."""

    row: int
    """The sample's number in the batch."""
    position: int
    """In the sample's own unpadded sequence."""
    token: int
    concept: str
    sample_id: str
    piece: int = 0
    """Index of the token within the noun; a noun's tokens are consecutive in a list of positions."""


def locate_mentions(
    batch: Batch, row: int, sample_id: str, mentions: Sequence[Mention], *, every: bool = False
) -> list[TokenPosition]:
    """Return the position that predicts the first token of each mention, aligned by the characters that tokens cover.

    With `every`, the positions of all tokens that cover a character of the mention.
    """
    positions = []
    for mention in mentions:
        # A token may begin before the mention, with the space.
        following = [index for index, (_, stop) in enumerate(batch.offsets[row]) if stop > mention.start]
        rest = [index for index in following[1:] if every and batch.offsets[row][index][0] < mention.stop]
        for piece, index in enumerate([*following[:1], *rest]):
            # A token is predicted by the output of the position before it.
            position = batch.caption_start[row] + index - 1
            token = batch.tokens[row][index]
            positions.append(TokenPosition(row, position, token, mention.concept, sample_id, piece))
    return positions


def positions_of(
    batch: Batch, named: Sequence[tuple[str, Sequence[Mention]]], *, every: bool = False
) -> list[TokenPosition]:
    """Return all samples' positions; `named` has each one's sample id and mentions. See `locate_mentions`."""
    return [
        occurrence
        for row, (sample_id, mentions) in enumerate(named)
        for occurrence in locate_mentions(batch, row, sample_id, mentions, every=every)
    ]


def flat_positions(batch: Batch, positions: Sequence[TokenPosition]) -> Int[Tensor, " position"]:
    """Return the positions as indices into (row, position), flattened."""
    flat = [batch.flat(occurrence.row, occurrence.position) for occurrence in positions]
    return torch.tensor(flat, dtype=torch.long)


def rank_in_row(positions: Sequence[TokenPosition]) -> list[int]:
    """Return how many positions of the same sample come before each one."""
    seen: Counter[int] = Counter()
    ranks = []
    for occurrence in positions:
        ranks.append(seen[occurrence.row])
        seen[occurrence.row] += 1
    return ranks
