"""OWL-ViT and OWLv2 (Minderer et al. 2022), cut in two: a tower up to its last layer, and a detector on top of it.

    pixels ─► all layers but the last ─► t (CLS first) ─► last layer ─► norms, patch × CLS ─► class and box heads

The cut is that of Giulivi & Boracchi (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL.Image import Image, new
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, Owlv2ForObjectDetection, OwlViTForObjectDetection

from mmray.detector.boxes import from_centres
from mmray.detector.detection import Detection, Detector, check_words
from mmray.errors import InputError
from mmray.models.checkpoint import check_config
from mmray.models.loading import refuse_missing, resolve
from mmray.models.patches import WHOLE

KINDS: dict[str, Any] = {"owlvit": OwlViTForObjectDetection, "owlv2": Owlv2ForObjectDetection}
QUERY = "a photo of a {}"
"""Text of a query, as published."""


class OwlTower(nn.Module):
    """The tower up to its last layer."""

    skipped = 1

    def __init__(self, network: Any, processor: Any) -> None:
        super().__init__()
        self.tower: Any = _inner(network).vision_model
        self.processor = processor
        self.side = int(network.num_patches_width)

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return images as the detector's own image processor prepares them."""
        pixels: Tensor = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    def covers(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of the image that the tower sees: for OWLv2, the image padded to a square."""
        if not getattr(self.processor.image_processor, "do_pad", False):
            return WHOLE
        # Padding goes to the right and below, so the part begins in the image's corner and may be larger than 1.
        return (0.0, 0.0, max(size) / size[0], max(size) / size[1])

    @cached_property
    def padding_colour(self) -> tuple[int, int, int]:
        """The colour that the processor pads with."""
        # Read off a padded white line, because the colour differs between versions of transformers.
        processor = self.processor.image_processor
        added = self.pixels([new("RGB", (2, 1), "white")])[0, :, -1, -1]
        red, green, blue = added * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
        return round(255 * float(red)), round(255 * float(green)), round(255 * float(blue))

    def forward(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row position width"]:
        """Return the input of the last layer."""
        dtype = self.tower.embeddings.patch_embedding.weight.dtype
        states: Tensor = self.tower.pre_layernorm(self.tower.embeddings(pixel_values.to(dtype)))
        for layer in self.tower.encoder.layers[:-1]:
            states = layer(states, None)
        return states


class OwlDetector(Detector):
    """The last layer and the heads."""

    def __init__(self, network: Any, processor: Any) -> None:
        super().__init__()
        self.network, self.processor = network, processor

    @torch.no_grad()
    def queries(self, words: Sequence[str]) -> Float[Tensor, "query dim"]:
        """Return the text tower's embeddings of the words. Raises InputError for an empty word or none."""
        check_words(words)
        # Padded to the full length, as the published processor does.
        inputs = self.processor.tokenizer(
            [QUERY.format(word) for word in words],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.network.config.text_config.max_position_embeddings,
        ).to(self.network.device)
        found = _inner(self.network).get_text_features(**inputs)
        # Newer versions of transformers return an output object, older ones the tensor.
        embeddings: Tensor = getattr(found, "pooler_output", found)
        return embeddings

    def forward(self, embedding: Float[Tensor, "row position width"], queries: Float[Tensor, "query dim"]) -> Detection:
        """Return one box per patch, and its logits."""
        tower = _inner(self.network).vision_model
        states = tower.post_layernorm(tower.encoder.layers[-1](embedding.to(self.network.dtype), None))
        # As in transformers' image_embedder: patches are multiplied by the CLS token.
        patches = self.network.layer_norm(states[:, 1:] * states[:, :1])
        logits, _ = self.network.class_head(patches, queries.expand(len(patches), -1, -1), None)
        boxes = (self.network.box_head(patches) + self.network.box_bias.to(patches.device)).sigmoid().float()
        return Detection(logits.float(), from_centres(boxes))


class Owl(NamedTuple):
    """A detector with its own tower."""

    tower: OwlTower
    detector: OwlDetector


def is_owl(name: str) -> bool:
    """Return whether a checkpoint is an OWL-ViT or OWLv2. Raises InputError where there is no such checkpoint."""
    try:
        return AutoConfig.from_pretrained(resolve(name)).model_type in KINDS
    except (OSError, ValueError, KeyError):
        return False


def open_owl(name: str, device: torch.device | str) -> Owl:
    """Load an OWL-ViT or OWLv2 from a folder or the hub, frozen. Raises InputError where it can't be loaded."""
    folder = resolve(name)
    check_config(folder)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in KINDS:
            raise InputError(f"{name}: {kind} is neither OWL-ViT nor OWLv2, nor a folder of heads; see --detector")
        loaded, report = KINDS[kind].from_pretrained(folder, output_loading_info=True)
        refuse_missing(name, report["missing_keys"])
        network = loaded.to(device).eval().requires_grad_(False)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{name}: not a detector that transformers can load ({' '.join(str(error).split())[:200]})"
        ) from error
    return Owl(OwlTower(network, processor), OwlDetector(network, processor))


def _inner(network: Any) -> Any:
    return getattr(network, network.base_model_prefix)
