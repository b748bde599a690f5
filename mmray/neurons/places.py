"""Where in a batch concepts are predicted: from characters of the caption to positions of the sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmray.models.prompting import Batch
from mmray.neurons.concepts import Mention


@dataclass(frozen=True)
class Place:
    """One occurrence in a batch: the row, the position whose output predicts the token, and the token."""

    row: int
    position: int
    token: int
    concept: str
    sample_id: str


def place_mentions(batch: Batch, row: int, sample_id: str, mentions: Sequence[Mention]) -> list[Place]:
    """Return the place that predicts the first token of each mention, aligned by the characters that tokens cover."""
    places = []
    for mention in mentions:
        for index, (_, stop) in enumerate(batch.offsets[row]):
            if stop > mention.start:
                position = batch.caption_start[row] + index - 1
                places.append(Place(row, position, batch.tokens[row][index], mention.concept, sample_id))
                break
    return places


def rank_in_row(places: Sequence[Place]) -> list[int]:
    """Return of each place how many places of the same row come before it."""
    seen: Counter[int] = Counter()
    ranks = []
    for place in places:
        ranks.append(seen[place.row])
        seen[place.row] += 1
    return ranks
