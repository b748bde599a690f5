"""A local text encoder that compares texts token by token, as BERTScore (Zhang et al. 2020) and MoverScore do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mmray.errors import InputError

TEXTS_AT_ONCE = 64


class Encoder:
    """A text encoder that `AutoModel` loads from a local folder; nothing is downloaded."""

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
        """Return unit vectors of each text's tokens in the last layer, without special tokens."""
        # By length, so that batches need little padding.
        missing = sorted({text for text in texts if text not in self._vectors}, key=len)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            part = missing[start : start + TEXTS_AT_ONCE]
            encoded = self.tokenizer(
                part, return_tensors="pt", padding=True, truncation=True, return_special_tokens_mask=True
            )
            # The mask of special tokens does not always include padding.
            special = encoded.pop("special_tokens_mask").bool() | ~encoded["attention_mask"].bool()
            states = self.network(**encoded.to(self.network.device)).last_hidden_state.float()
            for text, vectors, excluded in zip(part, functional.normalize(states, dim=-1), special, strict=True):
                self._vectors[text] = vectors[~excluded.to(vectors.device)].cpu()
        return [self._vectors[text] for text in texts]

    def match(self, candidate: str, reference: str) -> float:
        """Return the F1 of greedy matching: each token counts by its most similar token in the other text."""
        ours, theirs = self.vectors([candidate, reference])
        if not len(ours) or not len(theirs):
            return float(candidate == reference)
        similarity = ours @ theirs.T
        precision, recall = float(similarity.amax(dim=1).mean()), float(similarity.amax(dim=0).mean())
        return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0

    def move(self, candidate: str, reference: str) -> float:
        """Return 1 − the least mean distance that moves all tokens of one text to the other's (Zhao et al. 2019).

        As MoverScore, with single tokens of the last layer, all of the same mass: no n-grams, no idf.
        """
        ours, theirs = self.vectors([candidate, reference])
        if not len(ours) or not len(theirs):
            return float(candidate == reference)
        return 1 - earth_movers_distance(torch.cdist(ours, theirs))


def earth_movers_distance(cost: Float[Tensor, "from to"]) -> float:
    """Return the cost of moving a mass of 1, spread evenly over the rows, evenly onto the columns."""
    from scipy.optimize import linprog

    rows, columns = cost.shape
    if min(rows, columns) == 1:
        return float(cost.mean())
    # One equation per row and column: what leaves it, or arrives, is its share.
    from_rows, to_columns = np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))
    shares = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    found = linprog(cost.double().flatten().numpy(), A_eq=np.vstack([from_rows, to_columns]), b_eq=shares)
    return float(found.fun)
