r"""Detector heads on a captioner's own frozen tower: the network, and its files.

    embedding t ─► projection + positions ─► transformer layers ─┬─► class head ─► cosine with the queries ─► logits
                                                                 └─► box head ─► from the patch's centre ─► boxes

A query is the mean of the language model's input embeddings of a word's tokens, through a learned projection.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mmray.detector.boxes import centres, from_centres
from mmray.detector.detection import Detection, Detector, check_words
from mmray.errors import InputError
from mmray.models.loading import LoadedModel

WEIGHTS, FACTS = "heads.safetensors", "heads.json"
"""Files of a folder of heads. JSON keys of the second: model_digest, shape, and facts of the training."""


class Heads(Detector):
    """Class and box heads over a tower's patches; `shape` holds the arguments that rebuild them."""

    def __init__(self, model: LoadedModel, side: int, width: int, layers: int = 1, hidden: int = 192) -> None:
        super().__init__()
        self.shape = {"side": side, "width": width, "layers": layers, "hidden": hidden}
        # In a tuple, so that torch does not register the model's weights as the heads' own.
        self._model = (model,)
        words = int(model.network.get_input_embeddings().weight.shape[1])
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        # Attribute names are keys in the weights' file.
        self.place = nn.Parameter(0.02 * torch.randn(side * side, hidden))
        self.blocks = nn.ModuleList(
            # Six attention heads, so `hidden` has to be a multiple of 6.
            nn.TransformerEncoderLayer(hidden, 6, 3 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.to_class = nn.Linear(hidden, hidden)
        self.to_scale = nn.Linear(hidden, 2)  # as in OWL-ViT: cosines alone are too flat for a sigmoid
        self.to_box = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 4))
        self.from_word = nn.Sequential(nn.LayerNorm(words), nn.Linear(words, 2 * hidden), nn.GELU())
        self.to_query = nn.Linear(2 * hidden, hidden)
        # Not saved, because `side` decides them.
        self.register_buffer("anchors", _anchors(side), persistent=False)
        with torch.no_grad():
            self.to_scale.bias.copy_(torch.tensor([2.5, -6.0]))  # untrained heads are confident of nothing

    @torch.no_grad()
    def word_embeddings(self, words: Sequence[str]) -> Float[Tensor, "query embedding"]:
        """Return the mean of the language model's embeddings of each word's tokens.

        A word is tokenized in lower case after a blank, as in the heads' training.
        """
        (model,) = self._model
        table: Tensor = model.network.get_input_embeddings().weight
        rows = []
        for word in words:
            ids = model.tokenizer(f" {word.strip().casefold()}", add_special_tokens=False)["input_ids"]
            rows.append(table[torch.tensor(ids, device=table.device)].float().mean(dim=0))
        return torch.stack(rows).to(self.place.device)

    def queries(self, words: Sequence[str]) -> Float[Tensor, "query dim"]:
        """Return a vector of norm 1 per word. Raises InputError for an empty word or none."""
        check_words(words)
        return self.project(self.word_embeddings(words))

    def project(self, embeddings: Float[Tensor, "query embedding"]) -> Float[Tensor, "query dim"]:
        """Return the queries of word embeddings."""
        return functional.normalize(self.to_query(self.from_word(embeddings)), dim=1)

    def forward(self, embedding: Float[Tensor, "row patch width"], queries: Float[Tensor, "query dim"]) -> Detection:
        """Return one box per patch; a logit is the cosine with a query, scaled and shifted per patch."""
        states = self.enter(embedding) + self.place
        for block in self.blocks:
            states = block(states)
        states = self.norm(states)
        cosines = functional.normalize(self.to_class(states), dim=2) @ queries.T
        scale, shift = self.to_scale(states).split(1, dim=2)
        # The head only learns the difference from the patch's default box, as OWL-ViT's does.
        boxes = (self.to_box(states) + self.anchors).sigmoid()
        return Detection(cosines * scale.exp() + shift, from_centres(boxes))


def _anchors(side: int) -> Float[Tensor, "patch 4"]:
    """Return each patch's default box before the sigmoid: around its centre, a third of the image wide and high."""
    return torch.cat([centres(side), torch.full((side * side, 2), 1 / 3)], dim=1).logit()


def save_heads(heads: Heads, folder: Path, model: LoadedModel, facts: dict[str, Any]) -> None:
    """Write heads in half precision, with the digest of their model and facts of their training."""
    folder.mkdir(parents=True, exist_ok=True)
    # Half precision, because the demo ships them with the package.
    weights = {name: value.detach().half().contiguous() for name, value in heads.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    described = {"model_digest": model.digest, "shape": heads.shape, **facts}
    (folder / FACTS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def load_heads(folder: Path, model: LoadedModel) -> Heads:
    """Read heads for a model. Raises InputError where the folder has none, or those of another model."""
    try:
        described = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        # Half precision is the file's alone: the heads run in fp32.
        weights = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
        made_for, shape = described["model_digest"], described["shape"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: no detector heads ({WEIGHTS}, {FACTS}); make them: python -m jobs.demo.train --detector"
        ) from error
    if made_for != model.digest:
        raise InputError(
            f"{folder}: heads of another model (digest {made_for}; {model.name} has {model.digest}); "
            f"make its own with python -m jobs.demo.train --detector --model {model.name}"
        )
    try:
        heads = Heads(model, **shape)
        heads.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{folder}: its weights do not have the shape that {FACTS} gives") from error
    heads.eval().requires_grad_(False)
    return heads.to(model.device)
