"""Where in a batch concepts are predicted: from characters of the caption to positions of the sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmray.models.prompting import Batch
from mmray.neurons.concepts import Mention


@dataclass(frozen=True)
class TokenPosition:
    """One occurrence in a batch: the row, the position whose output predicts the token, and the token."""

    row: int
    position: int
    token: int
    concept: str
    sample_id: str
    piece: int = 0
    """Which of the noun's tokens it is, from 0; the places of one noun follow each other."""


def place_mentions(
    batch: Batch, row: int, sample_id: str, mentions: Sequence[Mention], *, every: bool = False
) -> list[TokenPosition]:
    """Return the place that predicts the first token of each mention, aligned by the characters that tokens cover.

    With `every`, the places of all its tokens: those that cover a character of it.
    """
    places = []
    for mention in mentions:
        behind = [index for index, (_, stop) in enumerate(batch.offsets[row]) if stop > mention.start]
        spelling = [index for index in behind[1:] if every and batch.offsets[row][index][0] < mention.stop]
        for piece, index in enumerate([*behind[:1], *spelling]):
            position = batch.caption_start[row] + index - 1
            places.append(TokenPosition(row, position, batch.tokens[row][index], mention.concept, sample_id, piece))
    return places


def places_of(
    batch: Batch, named: Sequence[tuple[str, Sequence[Mention]]], *, every: bool = False
) -> list[TokenPosition]:
    """Return the places of all rows, whose sample ids and mentions are `named`; see `place_mentions`."""
    return [
        place
        for row, (sample_id, mentions) in enumerate(named)
        for place in place_mentions(batch, row, sample_id, mentions, every=every)
    ]


def rank_in_row(places: Sequence[TokenPosition]) -> list[int]:
    """Return of each place how many places of the same row come before it."""
    seen: Counter[int] = Counter()
    ranks = []
    for place in places:
        ranks.append(seen[place.row])
        seen[place.row] += 1
    return ranks
