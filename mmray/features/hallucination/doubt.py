"""Captions written again without the objects that the model itself doubts, from its probability of each mention."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.features.hallucination.mentions import MentionReader, WrittenCaption
from mmray.models.bans import banned_tokens
from mmray.models.combined_logits import views_of
from mmray.models.decodings import GREEDY, Decoding

ROUNDS = 3
"""Times that a caption is written again: what takes a banned word's place may be doubted, too."""


def without_doubted(
    reader: MentionReader, pairs: Sequence[tuple[Sample, Image]], probability: float, decoding: Decoding = GREEDY
) -> list[WrittenCaption]:
    """Caption samples; where a mention is less likely than `probability`, again without its word.

    The probability is that of all of a mention's tokens together; see `mention_probabilities`.
    """
    captions = {caption.sample.sample_id: caption for caption in reader.captions(pairs, decoding)}
    words: dict[str, set[str]] = defaultdict(set)
    new = list(captions.values())
    for _ in range(ROUNDS):
        doubted = set()
        for (name, number), found in mention_probabilities(reader, new, decoding).items():
            if found < probability:
                mention = captions[name].mentions[number]
                # Added to those of earlier rounds, or a banned word would come back.
                words[name].add(captions[name].text[mention.start : mention.stop])
                doubted.add(name)
        if not doubted:
            break
        again = [pair for pair in pairs if pair[0].sample_id in doubted]
        banned = [banned_tokens(reader.model, sorted(words[sample.sample_id])) for sample, _ in again]
        new = reader.captions(again, decoding, banned=banned)
        captions |= {caption.sample.sample_id: caption for caption in new}
    return [captions[sample.sample_id] for sample, _ in pairs]


def mention_probabilities(
    reader: MentionReader, captions: Sequence[WrittenCaption], decoding: Decoding
) -> dict[tuple[str, int], float]:
    """Return the probability of each mention, by sample and number of the mention in the caption.

    It is the model's own. If the decoding averages views of the image, it is the mean probability over these, with the
    decoding's weights.
    """
    images, found = [caption.image for caption in captions], defaultdict[tuple[str, int], float](float)
    # A contrast of views is no probability.
    weights = [-weight for _, weight in decoding.views if weight < 0]
    views = views_of(images, decoding) if weights else []
    shown = [images, *(views[start : start + len(images)] for start in range(0, len(views), len(images)))]
    for weight, own in zip((1 - sum(weights), *weights), shown, strict=True):
        seen = [replace(caption, image=image) for caption, image in zip(captions, own, strict=True)]
        for mentioned in reader.read(seen):
            for row in mentioned.rows:
                # Of probabilities, not of their logarithms: by these, one view would have a veto.
                found[row["sample_id"], row["mention"]] += weight * math.exp(row["log_prob"])
    return dict(found)
