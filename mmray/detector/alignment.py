r"""The network W from another tower's embedding to a LLaVA's image tokens: its layers, its loss and its files.

    image ─┬─► tower, frozen ─► embedding t ─► W ─► tokens ─────────┐
           └─► the LLaVA's own tower and projector, frozen ─► tokens┴─► mean squared error

Trained as in the code of Giulivi & Boracchi (2024): no text, AdamW, learning rate 1e-4, weight decay 1e-2, batch 16.
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

from mmray.detector import Shape
from mmray.detector.vision_tower import OwnTower, VisionTower
from mmray.errors import InputError
from mmray.models.loading import LoadedModel
from mmray.models.patches import covered
from mmray.storage import Store, open_store

WEIGHTS, FACTS = "alignment.safetensors", "alignment.json"
"""Files of an aligned network's folder. JSON keys of the second: shape, digests, training, measures."""

Embedding = Float[Tensor, "row position width"]
Tokens = Float[Tensor, "row patch token"]


class Alignment(nn.Module):
    """W: each patch of an embedding to one image token. The first `skipped` positions (CLS) are dropped.

    `projector` is the shape of LLaVA's own: two layers, GELU. `mlp` is the authors' final choice: four layers, ReLU,
    hidden layers of width `hidden` (published: 8192).
    """

    def __init__(self, kind: Shape, width: int, hidden: int, tokens: int, skipped: int) -> None:
        super().__init__()
        self.shape = {"kind": kind, "width": width, "hidden": hidden, "tokens": tokens, "skipped": skipped}
        self.skipped = skipped
        # LLaVA's projector has one inner layer, as wide as its output; `mlp` has three.
        inner = [tokens] if kind == "projector" else [hidden] * 3
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(zip([width, *inner], [*inner, tokens], strict=True)):
            if number:
                layers.append(nn.GELU() if kind == "projector" else nn.ReLU())
            layers.append(nn.Linear(inputs, outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: Embedding) -> Tokens:
        """Return the image tokens of an embedding, in the embedding's number format."""
        # W stays in fp32 next to a model in half precision: it was trained so.
        found: Tensor = self.layers(embedding[:, self.skipped :].float())
        return found.to(embedding.dtype)


@dataclass(frozen=True, eq=False)
class Pair:
    """A tower, and the LLaVA whose image tokens W learns to make from it; both frozen."""

    tower: VisionTower
    model: LoadedModel

    @torch.no_grad()
    def examples(self, images: Sequence[Image]) -> tuple[Embedding, Tokens]:
        """Return W's inputs and targets: the tower's embeddings of images, and the LLaVA's own image tokens."""
        device, dtype = self.model.device, self.model.network.dtype
        embedding = self.tower(self.tower.pixels(images).to(device, dtype))
        own = OwnTower(self.model)
        tokens: Tensor = own.projector(own(own.pixels([self.shared_view(image) for image in images]).to(device, dtype)))
        return embedding, tokens

    def shared_view(self, image: Image) -> Image:
        """Return the part of an image that the tower sees, in a form that the LLaVA crops no further.

        Patches of the two towers then show the same part of the image.
        """
        left, top, width, height = self.tower.covers(image.size)
        if (left, top, width, height) == covered(self.model, image.width / image.height):
            return image
        # OWLv2 sees more than the image, which it pads to a square on the right or below.
        seen = new("RGB", (round(width * image.width), round(height * image.height)), self.tower.padding_colour)
        seen.paste(image, (-round(left * image.width), -round(top * image.height)))
        side = int(self.model.network.config.vision_config.image_size)
        return seen.resize((side, side))

    def network(self, kind: Shape, hidden: int) -> Alignment:
        """Return an untrained W between the two. Raises InputError where their patch grids differ."""
        embedding, tokens = self.examples([new("RGB", (64, 64))])
        patches = embedding.shape[1] - self.tower.skipped
        if patches != tokens.shape[1]:
            raise InputError(
                f"the tower has {patches} patches and {self.model.name} {tokens.shape[1]} image tokens; choose two "
                "of one grid (OWL-ViT base, patch 32, at 768 pixels and LLaVA-1.5 both have 24 × 24)"
            )
        return Alignment(kind, embedding.shape[2], hidden, tokens.shape[2], self.tower.skipped)


def alignment_loss(
    network: nn.Module,
    embedding: Embedding,
    tokens: Tokens,
    rows: int,
) -> Float[Tensor, ""]:
    """Return these rows' share of the mean squared error over the `rows` rows of all workers.

    Shares add up to the mean, however the rows are split. A worker without rows has a share of 0.
    """
    # Without rows the network still runs, so that its gradients are 0 rather than None.
    error = functional.mse_loss(network(embedding).float(), tokens.float(), reduction="sum")
    return error / max(rows * tokens[0:1].numel(), 1) if len(tokens) else error


def optimiser(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return the published optimiser: AdamW, without a schedule."""
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)


def save_alignment(store: Store, network: Alignment, facts: dict[str, Any]) -> None:
    """Write W and its description: shape, digests of tower and LLaVA, measures."""
    store.put(WEIGHTS, save({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}))
    store.put(FACTS, json.dumps({"shape": network.shape, **facts}, indent=1).encode())


def load_alignment(folder: str, model: LoadedModel, tower_digest: str, *, measured: bool = True) -> Alignment:
    """Read a frozen network W for this LLaVA and the tower of this digest.

    Raises InputError where there is none or it was made for others. With `measured` it also refuses a network whose
    joint model has not been compared with the original yet.
    """
    with _refusing(folder):
        description, store = _read(folder)
        network = Alignment(**description["shape"])
        network.load_state_dict(load(store.read(WEIGHTS)))
        made_for = description["digests"]["tower"], description["digests"]["model"]
    # The digests are of the files: another checkpoint of the same shape would load, and map to nonsense.
    for what, own, expected in zip(("tower", "model"), made_for, (tower_digest, model.digest), strict=True):
        if own != expected:
            raise InputError(f"{folder}: aligned with another {what} (digest {own}; this one has {expected})")
    if measured and not description.get("measures"):
        raise InputError(f"{folder}: not yet compared with the original; run the same mmray align again")
    return network.to(model.device).eval().requires_grad_(False)


def alignment_measures(folder: str) -> dict[str, dict[str, Any]]:
    """Return each measure of the original model (before) and of the joint one (after). Raises InputError if none."""
    with _refusing(folder):
        measures: dict[str, dict[str, Any]] = _read(folder)[0]["measures"]
    return measures


def alignment_digest(folder: str) -> str:
    """Return a digest of a network W: its weights, its shape and what it was made from. Raises InputError if none.

    Times and measures are left out, so that validating a network again does not make it another one.
    """
    with _refusing(folder):
        description, store = _read(folder)
        weights = hashlib.sha256(store.read(WEIGHTS)).digest()
        made_from = json.dumps([description["shape"], description["digests"]], sort_keys=True)
    # Hashed from the files rather than loaded: plans need the digest where there may be no GPU and no LLaVA.
    return hashlib.sha256(made_from.encode() + weights).hexdigest()[:16]


def _read(folder: str) -> tuple[dict[str, Any], Store]:
    store = open_store(folder)
    return json.loads(store.read(FACTS)), store


@contextmanager
def _refusing(folder: str) -> Iterator[None]:
    # Whatever a foreign or damaged file makes the readers raise becomes one line of what is wrong with the folder.
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no aligned network ({FACTS}, {WEIGHTS}); make one with mmray align") from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: not written by mmray align ({' '.join(str(error).split())[:200]})") from error
