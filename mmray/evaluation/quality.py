"""How near captions are to the data's: sacrebleu, and greedy matching of tokens by a local encoder as in BERTScore."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

from mmray.errors import InputError
from mmray.evaluation.rows import Rows

ORDERS = 4
"""Longest n-gram of BLEU."""
BLEU_TOKENISER = {"zh": "zh", "ja": "char", "ko": "char"}
"""Tokeniser of sacrebleu by language; others get its own default."""
TEXTS_AT_ONCE = 64


def has_bleu(wanted: bool | None) -> bool:
    """Return whether to measure BLEU: as wanted, or where sacrebleu is installed; InputError where it must be."""
    installed = find_spec("sacrebleu") is not None
    if wanted and not installed:
        raise InputError("--bleu: sacrebleu is not installed; pip install 'mmray[evaluation]', or leave --bleu out")
    return installed if wanted is None else wanted


def bleu(rows: Rows, name: str, reference: str, language: str | None, before: str, after: str) -> None:
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


class Encoder:
    """A text encoder of a local folder, which `AutoModel` loads; nothing is fetched."""

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (Path(folder).expanduser() / "config.json").is_file():
            raise InputError(f"--encoder {folder}: no config.json there; give the folder of a transformers encoder")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.network: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--encoder {folder}: not an encoder that transformers can load ({reason})") from error
        self._vectors: dict[str, Float[Tensor, "token hidden"]] = {}

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> list[Float[Tensor, "token hidden"]]:
        """Return the unit vectors of each text's tokens in the last layer, without the special tokens."""
        missing = sorted({text for text in texts if text not in self._vectors}, key=len)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            part = missing[start : start + TEXTS_AT_ONCE]
            encoded = self.tokenizer(
                part, return_tensors="pt", padding=True, truncation=True, return_special_tokens_mask=True
            )
            special = encoded.pop("special_tokens_mask").bool() | ~encoded["attention_mask"].bool()
            states = self.network(**encoded.to(self.network.device)).last_hidden_state.float()
            for text, rows, left_out in zip(part, functional.normalize(states, dim=-1), special, strict=True):
                self._vectors[text] = rows[~left_out.to(rows.device)].cpu()
        return [self._vectors[text] for text in texts]

    def match(self, candidate: str, reference: str) -> float:
        """Return F1 of greedy matching: each token's most similar one in the other text (Zhang et al. 2020)."""
        one, other = self.vectors([candidate, reference])
        if not len(one) or not len(other):
            return float(candidate == reference)
        similar = one @ other.T
        precision, recall = float(similar.amax(dim=1).mean()), float(similar.amax(dim=0).mean())
        return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def similarity(rows: Rows, encoder: Encoder, captions: Sequence[tuple[str, str, str, str]]) -> None:
    """Add the similarity of captions to the data's: (sample_id, reference, before, after) of each."""
    encoder.vectors([text for _, *texts in captions for text in texts])
    for name, reference, before, after in captions:
        rows.share("bertscore", name, encoder.match(before, reference), encoder.match(after, reference))
