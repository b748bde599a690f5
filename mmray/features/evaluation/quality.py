"""Corpus BLEU against the data's captions, by sacrebleu, summed over samples."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mmray.errors import InputError

ORDERS = 4
"""Longest n-gram of BLEU."""
BLEU_TOKENISER = {"zh": "zh", "ja": "char", "ko": "char"}
"""sacrebleu's tokeniser by language; others get its default, 13a."""


def has_bleu(requested: bool | None) -> bool:
    """Return whether to measure BLEU: as requested, by default if sacrebleu is installed.

    Raises InputError if it is requested and sacrebleu is not installed.
    """
    installed = find_spec("sacrebleu") is not None
    if requested and not installed:
        raise InputError("--bleu: sacrebleu is not installed; pip install 'mmray[evaluation]', or leave --bleu out")
    return installed if requested is None else requested


def bleu_sums(caption: str, reference: str, language: str | None) -> list[float]:
    """Return a caption's length, its reference's, and per order the matching n-grams, then all n-grams."""
    import sacrebleu

    tokeniser = BLEU_TOKENISER.get((language or "en")[:2], "13a")
    # Only its counts are used: corpus BLEU is a function of summed counts, not a mean of sentences' scores.
    score = sacrebleu.sentence_bleu(caption, [reference], tokenize=tokeniser)
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu_value(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the corpus BLEU of these totals, from 0 to 100, with sacrebleu's smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    # sacrebleu wants whole numbers, and totals come as floats.
    found = []
    for row in np.rint(totals).astype(int).tolist():
        correct, total = row[2 : 2 + ORDERS], row[2 + ORDERS :]
        score = BLEU.compute_bleu(correct, total, sys_len=row[0], ref_len=row[1], smooth_method="exp")
        found.append(score.score)
    return np.array(found)
