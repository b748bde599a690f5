r"""The joint model (Giulivi & Boracchi 2024): one vision embedding feeds a detector and the language model.

    image ─► tower ─► embedding t ─┬─► detector ─► boxes with a logit per word
                                   └─► tokens ───► image tokens ─► language model ─► words

All weights are frozen. Gradients are taken with respect to t, so those of words and those of boxes can be compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
from mmray.models.generation import end_tokens, split_at_special
from mmray.models.loading import LoadedModel, digest, load, resolve
from mmray.models.options import LONGEST
from mmray.models.prompting import Batch, encode, pad_left

DEMO = "demo"


@dataclass(frozen=True, eq=False)
class ImageDetector:
    """A detector with the tower whose embedding it reads, on the device and in the number format of a model."""

    model: LoadedModel
    detector: Detector
    tower: VisionTower

    def pixels(self, images: Sequence[Image]) -> Float[Tensor, "row channel height width"]:
        """Return images as the tower takes them."""
        return self.tower.pixels(images).to(self.model.device, self.model.network.dtype)

    @torch.no_grad()
    def embed(self, pixel_values: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row patch width"]:
        """Return the vision embedding t, detached: `t.requires_grad_()` starts a graph."""
        embedding: Tensor = self.tower(pixel_values)
        return embedding

    def detect(self, embedding: Float[Tensor, "row patch width"], words: Sequence[str]) -> Detection:
        """Return the detector's boxes and their logits for these words, differentiable in the embedding."""
        with torch.no_grad():
            queries = self.detector.queries(words)
        # Heads are in fp32, whatever the model's number format.
        found: Detection = self.detector(embedding.float(), queries)
        return found

    @torch.no_grad()
    def confidences(
        self, embedding: Float[Tensor, "row patch width"], words: Sequence[str]
    ) -> Float[Tensor, "row query"]:
        """Return the detector's confidence in each word: the highest probability of any box."""
        return self.detect(embedding, words).logits.sigmoid().amax(dim=1)

    def confidence(self, image: Image, words: Collection[str]) -> dict[str, float]:
        """Return the detector's confidence in each of the words, for one image."""
        if not words:
            return {}
        queries = sorted(words)
        found = self.confidences(self.embed(self.pixels([image])), queries)
        return dict(zip(queries, found[0].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class JointModel(ImageDetector):
    """A language model and a detector that read the same embedding of an image.

    `tokens` turns the embedding into image tokens: the model's own projector, or a network aligned to it.
    """

    tokens: nn.Module

    def logits(self, batch: Batch, embedding: Float[Tensor, "row patch width"]) -> Float[Tensor, "row position token"]:
        """Run the language model on the batch with the embedding in place of its images.

        Differentiable in the embedding. Logits at a position predict the next token. Raises InputError as `inputs`.
        """
        found: Tensor = self.model.network(**self.inputs(batch, embedding), use_cache=False).logits
        return found

    def inputs(self, batch: Batch, embedding: Float[Tensor, "row patch width"]) -> dict[str, Tensor]:
        """Return the network's inputs for a batch: its token embeddings, with image tokens made of the embedding.

        Raises InputError where there are more or fewer image tokens than positions for them.
        """
        device = self.model.device
        ids = batch.inputs["input_ids"].to(device)
        text = self.model.network.get_input_embeddings()(ids)
        image_token = self.model.parts.image_token_id
        # No token has the id -1: without image tokens, the check below fails with its message.
        is_image = ids.eq(-1 if image_token is None else image_token)
        tokens = self.tokens(embedding).to(text.device, text.dtype)
        # masked_scatter would silently leave positions empty, or drop tokens.
        if int(is_image.sum()) != tokens.shape[0] * tokens.shape[1]:
            raise InputError(
                f"{self.model.name}: {tokens.shape[0] * tokens.shape[1]} image tokens for {int(is_image.sum())} "
                "positions; the aligned network has to make as many as the model's own projector"
            )
        return {
            "inputs_embeds": text.masked_scatter(is_image[..., None], tokens),
            "attention_mask": batch.inputs["attention_mask"].to(device),
        }

    @torch.no_grad()
    def generate(
        self, batch: Batch, embedding: Float[Tensor, "row patch width"], longest: int = LONGEST
    ) -> tuple[list[list[int]], Float[Tensor, "row token hidden"]]:
        """Return each row's greedy continuation, without the end of sequence, and the states that predicted it.

        The states are the final norm's inputs, one per generated token.
        """
        # Padding goes to the left here: every row then continues at the last position.
        inputs = self.inputs(replace(batch, inputs=pad_left(batch.inputs)), embedding)
        states: list[Tensor] = []
        # The last position alone, because the first step runs over the whole prompt.
        with capture_input(self.model.norm, lambda entered: states.append(entered[:, -1])):
            generated = self.model.network.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
        ends = end_tokens(self.model)
        return [split_at_special(row, ends)[0] for row in generated.tolist()], torch.stack(states, dim=1)

    def replies(
        self,
        prompts: Sequence[str],
        images: Sequence[Image],
        embedding: Float[Tensor, "row patch width"],
        batch_size: int,
        longest: int = LONGEST,
    ) -> Iterator[tuple[list[int], Float[Tensor, "token hidden"]]]:
        """Yield the greedy reply to each prompt about the embedding in its row, with states as `generate` returns.

        Only the size of `images` matters, because the number of image tokens may depend on it.
        """
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            empty: list[list[int]] = [[] for _ in prompts[part]]
            batch = encode(self.model, prompts[part], images[part], empty, [[] for _ in empty])
            yield from zip(*self.generate(batch, embedding[part], longest), strict=True)


def load_joint(name: str, detector: str = DEMO, alignment: str | None = None) -> JointModel:
    """Load a model and a detector that read one embedding.

    `detector` is `demo` (the shipped heads on the demo's tower), a folder of heads trained on the model's own tower, or
    an OWL-ViT or OWLv2 checkpoint (folder or hub id). The last needs `alignment`, the folder of a network from its
    embedding to the model's image tokens. Raises InputError where they can't be loaded or don't belong together.
    """
    return join(load(name), detector, alignment)


def join(model: LoadedModel, detector: str = DEMO, alignment: str | None = None) -> JointModel:
    """Add a detector to a loaded model; arguments and errors as in `load_joint`."""
    found = load_detector(model, detector)
    if isinstance(found.tower, OwnTower):
        if alignment is not None:
            raise InputError(
                f"--alignment {alignment}: the detector {detector} sees by {model.name}'s own tower, where there is "
                "nothing to align; name the OWL-ViT or OWLv2 by --detector"
            )
        return JointModel(model, found.detector, found.tower, found.tower.projector)
    if alignment is None:
        raise InputError(
            f"{detector}: its embedding is not {model.name}'s; give --alignment, the network between the two"
        )
    tokens = load_alignment(alignment, model, digest(resolve(detector)))
    return JointModel(model, found.detector, found.tower, tokens)


def load_detector(model: LoadedModel, detector: str) -> ImageDetector:
    """Load a detector next to a model. An OWL-ViT or OWLv2 brings its own tower, so any model will do.

    Raises InputError where it can't be loaded, or where its heads belong to another model.
    """
    folder = _heads(detector)
    if folder is not None:
        return ImageDetector(model, load_heads(folder, model), OwnTower(model))
    owl = open_owl(detector, model.device)
    return ImageDetector(model, owl.detector, owl.tower)


def detector_or_demo(detector: str | None, model: str) -> str | None:
    """Return the detector given; by default the demo's for the demo model, else none."""
    # The demo's heads fit its tower alone; other models have none that could be a default.
    return detector or (DEMO if model == DEMO else None)


def join_if_given(model: LoadedModel, detector: str | None, alignment: str | None) -> JointModel | None:
    """Add the detector of `detector_or_demo` to a model; None where there is none.

    Raises InputError as `join`, and for an alignment without a detector.
    """
    chosen = detector_or_demo(detector, model.name)
    if chosen is None and alignment is not None:
        raise InputError(f"--alignment {alignment}: give the OWL-ViT or OWLv2 that it is for by --detector")
    return None if chosen is None else join(model, chosen, alignment)


def detector_digest(detector: str) -> str:
    """Return a digest of a detector's files. Raises InputError where there is none."""
    return digest(_heads(detector) or resolve(detector))


def _heads(detector: str) -> Path | None:
    """Return the folder of a detector's heads; None for a detector with a tower of its own."""
    folder = mmray.demo.DETECTOR if detector == DEMO else Path(detector).expanduser()
    return folder if detector == DEMO or (folder / FACTS).is_file() else None
