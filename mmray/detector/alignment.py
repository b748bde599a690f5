r"""The network W that makes a LLaVA's image tokens of another tower's embedding, and how it is trained.

    image ─┬─► tower, frozen ─► embedding t ─► W ─► tokens ─────────┐
           └─► the LLaVA's own tower and projector, frozen ─► tokens┴─► mean squared error

Giulivi & Boracchi 2024, as their code has it: no text, AdamW, learning rate 1e-4, weight decay 1e-2, batch 16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image, new
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from mmray.detector.alignment_settings import Shape
from mmray.detector.vision_tower import OwnTower, VisionTower
from mmray.errors import InputError
from mmray.models.loading import LoadedModel
from mmray.models.patches import covered
from mmray.storage import Store, open_store

WEIGHTS, FACTS = "alignment.safetensors", "alignment.json"
"""Files of an aligned network's folder."""


class Alignment(nn.Module):
    """W: an embedding's patches to image tokens, each by itself; what stands before the patches (CLS) is left out.

    `projector` is the shape of LLaVA's own: two layers, GELU. `mlp` is the authors' final choice: four, ReLU, its inner
    ones `hidden` wide (published: 8192).
    """

    def __init__(self, kind: Shape, width: int, hidden: int, tokens: int, skipped: int) -> None:
        super().__init__()
        self.shape = {"kind": kind, "width": width, "hidden": hidden, "tokens": tokens, "skipped": skipped}
        self.skipped = skipped
        inner = [tokens] if kind == "projector" else [hidden] * 3
        layers: list[nn.Module] = []
        for number, (before, behind) in enumerate(zip([width, *inner], [*inner, tokens], strict=True)):
            if number:
                layers.append(nn.GELU() if kind == "projector" else nn.ReLU())
            layers.append(nn.Linear(before, behind))
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: Float[Tensor, "row place width"]) -> Float[Tensor, "row patch token"]:
        """Return the image tokens of an embedding, in its number format."""
        found: Tensor = self.layers(embedding[:, self.skipped :].float())
        return found.to(embedding.dtype)


@dataclass(frozen=True, eq=False)
class Pair:
    """What W learns from: a tower, and the LLaVA whose image tokens it is to make; both frozen."""

    sight: VisionTower
    model: LoadedModel

    @torch.no_grad()
    def examples(
        self, images: Sequence[Image]
    ) -> tuple[Float[Tensor, "row place width"], Float[Tensor, "row patch token"]]:
        """Return the embeddings of images, and the LLaVA's own projected tokens of the same."""
        device, dtype = self.model.device, self.model.network.dtype
        embedding = self.sight(self.sight.pixels(images).to(device, dtype))
        own = OwnTower(self.model)
        seen = own(own.pixels([self._alike(image) for image in images]).to(device, dtype))
        tokens: Tensor = own.projector(seen)
        return embedding, tokens

    def _alike(self, image: Image) -> Image:
        """Return the part of an image that the tower sees, so that the LLaVA crops nothing else away.

        What lies in a patch of the one then lies in the same patch of the other.
        """
        left, top, width, height = self.sight.covers(image.size)
        if (left, top, width, height) == covered(self.model, image.width / image.height):
            return image
        # OWLv2 makes a square of an image by adding below or to the right of it.
        seen = new("RGB", (round(width * image.width), round(height * image.height)), self.sight.filling)
        seen.paste(image, (-round(left * image.width), -round(top * image.height)))
        side = int(self.model.network.config.vision_config.image_size)
        return seen.resize((side, side))

    def network(self, kind: Shape, hidden: int) -> Alignment:
        """Return an untrained W of the shape that the two ask for.

        Raises InputError where the grids of their patches differ.
        """
        embedding, tokens = self.examples([new("RGB", (64, 64))])
        patches = embedding.shape[1] - self.sight.skipped
        if patches != tokens.shape[1]:
            raise InputError(
                f"the tower has {patches} patches and {self.model.name} {tokens.shape[1]} image tokens; choose two "
                "with one grid (as OWL-ViT base, patch 32, at 768 pixels and LLaVA-1.5 have 24 × 24)"
            )
        return Alignment(kind, embedding.shape[2], hidden, tokens.shape[2], self.sight.skipped)


def alignment_loss(
    network: nn.Module, embedding: Float[Tensor, "row place width"], tokens: Float[Tensor, "row patch token"], rows: int
) -> Float[Tensor, ""]:
    """Return these rows' part in the mean squared error over `rows` rows, of all workers.

    Parts add up to the mean, however rows are shared; no rows at all are a part of 0, with gradients of 0.
    """
    error = functional.mse_loss(network(embedding).float(), tokens.float(), reduction="sum")
    return error / max(rows * tokens[0:1].numel(), 1) if len(tokens) else error


def optimiser(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return the published optimiser; pure AdamW, without a schedule."""
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)


def save_alignment(store: Store, network: Alignment, facts: dict[str, Any]) -> None:
    """Write W and its facts: shape, digests of tower and LLaVA, measures."""
    store.put(WEIGHTS, save({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}))
    store.put(FACTS, json.dumps({"shape": network.shape, **facts}, indent=1).encode())


def load_alignment(folder: str, model: LoadedModel, tower_digest: str, *, measured: bool = True) -> Alignment:
    """Read a network W, frozen, for a LLaVA and a tower of this digest.

    Raises InputError where there is none, where it is another tower's or another LLaVA's, or, unless `measured` is
    False, where the joint model has not been measured next to the original.
    """
    with _refusing(folder):
        facts, store = _facts(folder)
        network = Alignment(**facts["shape"])
        network.load_state_dict(load(store.read(WEIGHTS)))
        made_for = facts["digests"]["tower"], facts["digests"]["model"]
    for what, own, wanted in zip(("tower", "model"), made_for, (tower_digest, model.digest), strict=True):
        if own != wanted:
            raise InputError(f"{folder}: aligned with another {what} (digest {own}, this one has {wanted})")
    if measured and not facts.get("measures"):
        raise InputError(f"{folder}: not measured yet next to the original; run the same mmray align again")
    return network.to(model.device).eval().requires_grad_(False)


def alignment_measures(folder: str) -> dict[str, dict[str, Any]]:
    """Return the measures of the original model (before) and of the joint one (after). Raises InputError as above."""
    with _refusing(folder):
        measures: dict[str, dict[str, Any]] = _facts(folder)[0]["measures"]
    return measures


def alignment_digest(folder: str) -> str:
    """Return a digest of a network W: weights, shape, and what it was made of; not of when, nor of what was measured.

    Raises InputError where there is none.
    """
    with _refusing(folder):
        facts, store = _facts(folder)
        weights = hashlib.sha256(store.read(WEIGHTS)).digest()
        made_of = json.dumps([facts["shape"], facts["digests"]], sort_keys=True)
    return hashlib.sha256(made_of.encode() + weights).hexdigest()[:16]


def _facts(folder: str) -> tuple[dict[str, Any], Store]:
    store = open_store(folder)
    return json.loads(store.read(FACTS)), store


@contextmanager
def _refusing(folder: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no aligned network ({FACTS}, {WEIGHTS}); make one: mmray align") from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: not written by mmray align ({' '.join(str(error).split())[:200]})") from error
