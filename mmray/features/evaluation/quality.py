"""How near captions are to the data's: sacrebleu, and greedy matching of tokens by a local encoder as in BERTScore."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mmray.errors import InputError
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.models.encoder import Encoder

ORDERS = 4
"""Longest n-gram of BLEU."""
BLEU_TOKENISER = {"zh": "zh", "ja": "char", "ko": "char"}
"""Tokeniser of sacrebleu by language; others get its own default."""


def has_bleu(wanted: bool | None) -> bool:
    """Return whether to measure BLEU: as wanted, or where sacrebleu is installed; InputError where it must be."""
    installed = find_spec("sacrebleu") is not None
    if wanted and not installed:
        raise InputError("--bleu: sacrebleu is not installed; pip install 'mmray[evaluation]', or leave --bleu out")
    return installed if wanted is None else wanted


def bleu(rows: MeasurementBuffer, name: str, reference: str, language: str | None, before: str, after: str) -> None:
    """Add a caption's part in corpus BLEU: lengths, and n-grams that match, of all."""
    rows.add("bleu", name, bleu_sums(before, reference, language), bleu_sums(after, reference, language))


def bleu_sums(caption: str, reference: str, language: str | None) -> list[float]:
    """Return a caption's length, its reference's, the matching n-grams of each order, and all of them."""
    import sacrebleu

    tokeniser = BLEU_TOKENISER.get((language or "en")[:2], "13a")
    score = sacrebleu.sentence_bleu(caption, [reference], tokenize=tokeniser)
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu_value(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return the corpus BLEU, 0 to 100, of these totals, with sacrebleu's smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    found = []
    for row in np.rint(totals).astype(int).tolist():
        correct, total = row[2 : 2 + ORDERS], row[2 + ORDERS :]
        score = BLEU.compute_bleu(correct, total, sys_len=row[0], ref_len=row[1], smooth_method="exp")
        found.append(score.score)
    return np.array(found)


def similarity(rows: MeasurementBuffer, encoder: Encoder, captions: Sequence[tuple[str, str, str, str]]) -> None:
    """Add the similarity of captions to the data's: (sample_id, reference, before, after) of each."""
    encoder.vectors([text for _, *texts in captions for text in texts])
    for name, reference, before, after in captions:
        rows.share("bertscore", name, encoder.match(before, reference), encoder.match(after, reference))
