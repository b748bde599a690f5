"""Captions written again without the objects that the model itself doubts, from its log-probability of each mention."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.features.hallucination.mentions import MentionReader, WrittenCaption
from mmray.models.bans import banned_tokens

ROUNDS = 3
"""Times that a caption is written again: what takes a banned word's place may be doubted, too."""


def without_doubted(
    reader: MentionReader, pairs: Sequence[tuple[Sample, Image]], probability: float
) -> list[WrittenCaption]:
    """Caption samples; where a mention is less likely than `probability`, again without its word.

    The probability is that of all of a mention's tokens together.
    """
    captions = {caption.sample.sample_id: caption for caption in reader.captions(pairs)}
    words: dict[str, set[str]] = defaultdict(set)
    new = list(captions.values())
    for _ in range(ROUNDS):
        doubted = set()
        for mentioned in reader.read(new):
            for row in mentioned.rows:
                if row["log_prob"] < math.log(probability):
                    name = row["sample_id"]
                    mention = captions[name].mentions[row["mention"]]
                    words[name].add(captions[name].text[mention.start : mention.stop])
                    doubted.add(name)
        again = [pair for pair in pairs if pair[0].sample_id in doubted]
        banned = [banned_tokens(reader.model, sorted(words[sample.sample_id])) for sample, _ in again]
        new = reader.captions(again, banned=banned)
        captions |= {caption.sample.sample_id: caption for caption in new}
    return [captions[sample.sample_id] for sample, _ in pairs]
