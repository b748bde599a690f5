"""The beginning of a text as what a text-only model continues, in place of a question about an image."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from mmray.data.samples import Sample
from mmray.neurons.concepts import find_forms

CUE, FEWEST = 48, 4
"""Most words of a beginning, and fewest before a word that the model is to say."""
REST = 400
"""Characters of the text that are kept after it."""
WORD = re.compile(r"\S+")


def cloze(sample: Sample, words: Collection[str] = ()) -> Sample:
    """Return the sample with the text before the first of these words as its `cue`, and the text from there on.

    Without such a word, or with too little before it, the text is split after half of its first 2 · CUE words.
    """
    text = sample.caption
    starts = [word.start() for word in WORD.finditer(text)]
    found = [mention.start for mention in find_forms(text, frozenset(words), sample.language)]
    split = next((start for start in found if sum(one < start for one in starts) >= FEWEST), None)
    if split is None:
        shown = starts[: 2 * CUE]
        # A text of one word has no beginning: it is all caption.
        split = shown[len(shown) // 2] if len(shown) > 1 else 0
    before = [start for start in starts if start < split][-CUE:]
    cue = text[before[0] : split] if before else ""
    return replace(sample, cue=cue.strip(), caption=text[split : split + REST])
