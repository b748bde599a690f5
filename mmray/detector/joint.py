r"""The joint model (Giulivi & Boracchi 2024): one vision embedding feeds a detector and the language model.

    image ─► sight ─► embedding t ─┬─► detector ─► boxes with a logit a word
                                   └─► tokens ───► image tokens ─► language model ─► words

All weights are frozen: gradients are those in t, and say what text and boxes have of the same sight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

import mmray.demo
from mmray.detector.alignment import load_alignment
from mmray.detector.detection import Detection, Detector
from mmray.detector.heads import FACTS, load_heads
from mmray.detector.owl import open_owl
from mmray.detector.vision_tower import OwnTower, VisionTower
from mmray.errors import InputError
from mmray.models.capture import capture_input
from mmray.models.generation import end_tokens, until_special
from mmray.models.loading import LoadedModel, digest, load, resolve
from mmray.models.options import LONGEST
from mmray.models.prompting import Batch, pad_left

__all__ = ["Detection", "Detector", "JointModel", "Judge", "load_joint"]

DEMO = "demo"


@dataclass(frozen=True, eq=False)
class Judge:
    """A detector next to a model, with the sight that it judges images by."""

    model: LoadedModel
    detector: Detector
    sight: VisionTower

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return images as the sight takes them."""
        return self.sight.pixels(images).to(self.model.device, self.model.network.dtype)

    @torch.no_grad()
    def embed(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row patch width"]:
        """Return the shared vision embedding t, outside any graph: `t.requires_grad_()` begins one."""
        embedding: Tensor = self.sight(pixel_values)
        return embedding

    def detect(self, embedding: Float[Tensor, "row patch width"], words: Sequence[str]) -> Detection:
        """Return the detector's boxes, and their logits for these words."""
        with torch.no_grad():
            queries = self.detector.queries(words)
        found: Detection = self.detector(embedding.float(), queries)
        return found


@dataclass(frozen=True, eq=False)
class JointModel(Judge):
    """A language model and a detector that see the same embedding of an image.

    `tokens` makes image tokens of an embedding: the model's own projector, or a network aligned to it.
    """

    tokens: nn.Module

    def logits(self, batch: Batch, embedding: Float[Tensor, "row patch width"]) -> Float[Tensor, "row position token"]:
        """Run the language model on the batch, the embedding in place of its images; differentiable in the embedding.

        The logits at a position are of the token behind it. Raises InputError where the embedding's image tokens do
        not fill the places that the sequence has for them.
        """
        found: Tensor = self.model.network(**self.inputs(batch, embedding), use_cache=False).logits
        return found

    def inputs(self, batch: Batch, embedding: Float[Tensor, "row patch width"]) -> dict[str, Tensor]:
        """Return the network's inputs for a batch: embeddings of its sequence, image tokens from the embedding."""
        device = self.model.device
        ids = batch.inputs["input_ids"].to(device)
        words = self.model.network.get_input_embeddings()(ids)
        places = ids.eq(-1 if (own := self.model.parts.image_token_id) is None else own)
        seen = self.tokens(embedding).to(words.device, words.dtype)
        if int(places.sum()) != seen.shape[0] * seen.shape[1]:
            raise InputError(
                f"{self.model.name}: {int(places.sum())} places for image tokens and {seen.shape[0] * seen.shape[1]} "
                "of them; the aligned network has to make as many as the model's own projector"
            )
        return {
            "inputs_embeds": words.masked_scatter(places[..., None], seen),
            "attention_mask": batch.inputs["attention_mask"].to(device),
        }

    @torch.no_grad()
    def generate(
        self, batch: Batch, embedding: Float[Tensor, "row patch width"], longest: int = LONGEST
    ) -> tuple[list[list[int]], Float[Tensor, "row token hidden"]]:
        """Return the token ids that the model writes greedily behind each row, without the end of sequence, and what
        entered the final norm where each was predicted.
        """
        inputs = self.inputs(replace(batch, inputs=pad_left(batch.inputs)), embedding)
        states: list[Tensor] = []
        with capture_input(self.model.norm, lambda entered: states.append(entered[:, -1])):
            written = self.model.network.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
        ends = end_tokens(self.model)
        return [until_special(row, ends) for row in written.tolist()], torch.stack(states, dim=1)


def load_joint(name: str, detector: str = DEMO, alignment: str | None = None) -> JointModel:
    """Load a model with a detector on one embedding.

    `detector` is `demo` (the shipped heads on the demo's tower), a folder of heads trained on the model's own tower, or
    an OWL-ViT or OWLv2 checkpoint (folder or hub id), with `alignment` a folder of the network that makes the model's
    image tokens of its embedding. Raises InputError where they can't be loaded or don't belong together.
    """
    return join(load(name), detector, alignment)


def join(model: LoadedModel, detector: str = DEMO, alignment: str | None = None) -> JointModel:
    """Put a detector next to a model that is loaded already; as `load_joint`."""
    judge = judge_beside(model, detector)
    if isinstance(judge.sight, OwnTower):
        if alignment is not None:
            raise InputError(
                f"--alignment {alignment}: the detector {detector} sees by {model.name}'s own tower, where there is "
                "nothing to align; name the OWL-ViT or OWLv2 by --detector"
            )
        return JointModel(model, judge.detector, judge.sight, judge.sight.projector)
    if alignment is None:
        raise InputError(
            f"{detector}: its embedding is no {model.name}'s; give --alignment, the network between the two"
        )
    tokens = load_alignment(alignment, model, digest(resolve(detector)))
    return JointModel(model, judge.detector, judge.sight, tokens)


def judge_beside(model: LoadedModel, detector: str) -> Judge:
    """Load a detector that judges images for a model; an OWL-ViT or OWLv2 does so by its own sight.

    Raises InputError where it can't be loaded, or where its heads are another model's.
    """
    folder = _heads(detector)
    if folder is not None:
        return Judge(model, load_heads(folder, model), OwnTower(model))
    owl = open_owl(detector, model.device)
    return Judge(model, owl.detector, owl.sight)


def detector_or_demo(detector: str | None, model: str) -> str | None:
    """Return the detector that is asked for; by default that of the demo where it is the model, else none."""
    return detector or (DEMO if model == DEMO else None)


def join_if_asked(model: LoadedModel, detector: str | None, alignment: str | None) -> JointModel | None:
    """Put the detector that is asked for next to a model, by default the demo's next to the demo's; None without one.

    Raises InputError as `join`, and for an alignment without a detector.
    """
    chosen = detector_or_demo(detector, model.name)
    if chosen is None and alignment is not None:
        raise InputError(f"--alignment {alignment}: give the OWL-ViT or OWLv2 that it is for by --detector")
    return None if chosen is None else join(model, chosen, alignment)


def detector_digest(detector: str) -> str:
    """Return a digest of what a detector's files hold. Raises InputError where there is none."""
    return digest(_heads(detector) or resolve(detector))


def _heads(detector: str) -> Path | None:
    """Return the folder of a detector's heads; None where it is not heads on a model's own tower."""
    folder = mmray.demo.DETECTOR if detector == DEMO else Path(detector).expanduser()
    return folder if detector == DEMO or (folder / FACTS).is_file() else None
