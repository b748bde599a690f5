"""Train a detector's heads on a frozen tower for a given time, on rendered scenes with boxes, and measure them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torchvision.ops import box_iou, generalized_box_iou_loss

from jobs.demo.scenes import Scene, World, load_concepts
from mmray.detector.boxes import centres_inside, corners
from mmray.detector.detection import Detection
from mmray.detector.heads import Heads
from mmray.detector.vision_tower import OwnTower

SEED = 7_000
"""Seed of the scenes that heads are trained on; further chunks have those that follow."""
FRESH = 990_000
"""Seed of the scenes that they are measured on."""
_CHUNK = 1024
_KEPT = 48
"""Chunks whose embeddings are kept, to be trained on again."""
_MOST_OBJECTS = 3
_WARM_UP_STEPS = 100
_BOX_WEIGHT = 4.0
_FURTHEST = 0.8
"""Length at most of the moves that heads are hardened against, in parts of an embedding's norm."""
_HARDENING_STEPS, _OVERALL = 3, 1.3
"""Steps of such a move, and their lengths together in parts of its own: a way that turns still gets there."""

_log = logging.getLogger(__name__)


Embeddings = Float[Tensor, "scene patch width"]


class Chunk(NamedTuple):
    """Embeddings of scenes in half precision, their objects' numbers (-1: none) and boxes."""

    embeddings: Embeddings
    objects: Int[Tensor, "scene object"]
    boxes: Float[Tensor, "scene object 4"]


@dataclass(frozen=True)
class Words:
    """Embeddings of the concepts' names, and which names mean the same thing."""

    embeddings: Float[Tensor, "concept language embedding"]

    @classmethod
    def of(cls, heads: Heads) -> Words:
        """Look up every concept's names in all languages."""
        concepts = load_concepts().values()
        languages = list(next(iter(concepts)).names)
        rows = [heads.word_embeddings([concept.names[language] for language in languages]) for concept in concepts]
        return cls(torch.stack(rows))

    def draw(self) -> Float[Tensor, "concept embedding"]:
        """Return each concept's embedding in a language drawn for it, half of them in the first (English)."""
        concepts, languages, _ = self.embeddings.shape
        drawn = torch.randint(0, 2 * languages - 1, (concepts,)) - languages + 1
        return self.embeddings[torch.arange(concepts), drawn.clamp(min=0)]


@torch.no_grad()
def embed_scenes(tower: OwnTower, world: World, scenes: Sequence[Scene], *, quick: bool = False) -> Chunk:
    """Render scenes and run the tower over them; `quick`: in bf16, good enough to be trained on."""
    model = tower.model
    order = {name: number for number, name in enumerate(load_concepts())}
    objects = torch.full((len(scenes), _MOST_OBJECTS), -1)
    boxes = torch.zeros(len(scenes), _MOST_OBJECTS, 4)
    for row, scene in enumerate(scenes):
        objects[row, : len(scene.objects)] = torch.tensor([order[name] for name in scene.objects])
        boxes[row, : len(scene.boxes)] = torch.tensor(scene.boxes)
    embeddings = []
    for start in range(0, len(scenes), 64):
        images = world.render(scenes[start : start + 64])
        pixels = model.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=quick):
            seen = tower(pixels.to(model.device, model.network.dtype))
        embeddings.append(seen.half())
    return Chunk(torch.cat(embeddings), objects.to(model.device), boxes.to(model.device))


def train_heads(
    heads: Heads, tower: OwnTower, *, seconds: float, batch_size: int, learning_rate: float, seen: int = 0
) -> int:
    """Train heads in place until the time is up, and return the number of scenes that they have seen with those before.

    New scenes are rendered for the first two thirds of the time; each is trained on several times. In the last third
    heads are hardened: trained on embeddings moved to where they are hard, too. Heads that hold against such moves
    (Madry et al. 2018) have gradients that point at what things look like, and not at what fools the heads alone
    (Santurkar et al. 2019, "Image Synthesis with a Single (Robust) Classifier"). The learning rate falls as a cosine of
    the time, so that no two runs are alike.
    """
    words = Words.of(heads)
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=0.02, betas=(0.9, 0.98))
    heads.train()
    start, step, lately = time.monotonic(), 0, 0.0
    chunks = _chunks(tower, SEED + seen // _CHUNK)
    kept: list[Chunk] = []
    rendered = seen
    while (elapsed := time.monotonic() - start) < seconds:
        hardening = elapsed >= 0.67 * seconds
        if not kept or not hardening:
            kept = [*kept[-_KEPT + 1 :], next(chunks)]
            rendered += _CHUNK
        for _ in range(2 * _CHUNK // batch_size):
            part = min(1.0, (time.monotonic() - start) / seconds)
            cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * part)) / 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / _WARM_UP_STEPS) * cosine
            chunk = kept[int(torch.randint(len(kept), ()))]
            rows = torch.randint(len(chunk.objects), (batch_size,))
            batch = Chunk(*(tensor[rows.to(tensor.device)] for tensor in chunk))
            loss = _train_on(heads, batch, words.draw(), hardening=hardening)
            clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            lately += (loss - lately) * max(0.02, 1 / (step + 1))
            step += 1
        _log.info("step %d: loss %.3f, %d scenes, %.0f s", step, lately, rendered, time.monotonic() - start)
    heads.eval()
    return rendered


def _train_on(heads: Heads, batch: Chunk, words: Float[Tensor, "concept embedding"], *, hardening: bool) -> float:
    """Add the gradients of a batch as it is, when hardening of the batch moved too, and return the loss as it is."""
    queries = heads.project(words)

    def loss_of(embeddings: Embeddings, queries: Float[Tensor, "concept dim"]) -> Float[Tensor, ""]:
        with torch.autocast(heads.place.device.type, torch.bfloat16):
            found = heads(embeddings, queries)
        return detection_loss(Detection(*(part.float() for part in found)), batch, heads.shape["side"])

    start = batch.embeddings.float()
    whole = plain = loss_of(start, queries)
    if hardening:
        known = queries.detach()
        whole = plain + loss_of(_hardest(start, lambda embeddings: loss_of(embeddings, known)), queries)
    whole.backward()  # type: ignore[no-untyped-call]
    return plain.item()


def _hardest(start: Embeddings, loss_of: Callable[[Embeddings], Float[Tensor, ""]]) -> Embeddings:
    """Return embeddings moved along their loss's gradient, each by a length of its own, drawn up to `_FURTHEST`."""
    furthest = _FURTHEST * start.flatten(1).norm(dim=1)[:, None, None]
    bound = furthest * torch.rand_like(furthest)
    move = torch.zeros_like(start)
    for _ in range(_HARDENING_STEPS):
        leaf = (start + move).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
        move = move + _OVERALL * bound / _HARDENING_STEPS * _of_length_one(gradient)
        move = move * (bound / move.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)).clamp(max=1)
    return start + move


def _of_length_one(moves: Embeddings) -> Embeddings:
    return functional.normalize(moves.flatten(1), dim=1).reshape(moves.shape)


def _chunks(tower: OwnTower, seed: int) -> Iterator[Chunk]:
    world = World.load(tower.model.device)
    while True:
        yield embed_scenes(tower, world, world.sample(_CHUNK, seed), quick=True)
        seed += 1


def detection_loss(found: Detection, batch: Chunk, side: int) -> Float[Tensor, ""]:
    """Return the losses of the classes and of the boxes, a patch that an object's box holds.

    A patch is its object's where its centre lies in the object's box; boxes of a scene do not overlap.
    """
    inside = centres_inside(batch.boxes, side) & (batch.objects >= 0)[..., None]
    held = inside.any(dim=1)
    owner = inside.int().argmax(dim=1)
    wanted = torch.zeros_like(found.logits)
    rows, patches = held.nonzero(as_tuple=True)
    objects = owner[rows, patches]
    wanted[rows, patches, batch.objects[rows, objects]] = 1.0
    losses = functional.binary_cross_entropy_with_logits(found.logits, wanted, reduction="none")
    surprise = (found.logits.sigmoid() - wanted).square()  # the focal loss (Lin et al. 2017): what is sure counts less
    focal = (losses * surprise).sum() / len(rows)
    # Beside it the patches' words compete, and with them the background, whose logit is 0: so it is learnt faster.
    words = found.logits.shape[2]
    answer = torch.where(held, batch.objects.gather(1, owner), words)
    rivals = torch.cat([found.logits, torch.zeros_like(found.logits[..., :1])], dim=2)
    choice = functional.cross_entropy(rivals.flatten(0, 1), answer.flatten(), reduction="sum") / len(rows)
    true, predicted = batch.boxes[rows, objects], found.boxes[rows, patches]
    overlap: Tensor = generalized_box_iou_loss(corners(true), corners(predicted))
    places = 5 * (true - predicted).abs().sum(dim=1) + 2 * overlap
    return focal + choice + _BOX_WEIGHT * places.mean() / 4


@dataclass(frozen=True)
class Measures:
    """How heads do on fresh scenes: parts of the objects asked for, and the area under the curve of confidences."""

    objects: int
    pointing: float
    """The patch with the highest logit for the object's name has its centre in the object's box."""
    recall: float
    """That patch's box has an IoU of 0.5 or more with the object's."""
    presence: float
    """AUROC of the highest logit: names of what the scene shows against as many that it does not."""


@torch.no_grad()
def measure_heads(heads: Heads, tower: OwnTower, count: int = 512, seed: int = FRESH) -> Measures:
    """Ask for the English name of every object of fresh scenes, and for one that is not there."""
    world = World.load(tower.model.device)
    chunk = embed_scenes(tower, world, world.sample(count, seed))
    names = list(load_concepts())
    found = heads(chunk.embeddings.float(), heads.queries(names))
    rows, places = (chunk.objects >= 0).nonzero(as_tuple=True)
    objects, true = chunk.objects[rows, places], chunk.boxes[rows, places]
    highest, best = found.logits[rows, :, objects].max(dim=1)
    inside = centres_inside(true[:, None], heads.shape["side"])[:, 0]
    there = torch.zeros(len(chunk.objects), len(names), dtype=torch.bool, device=highest.device)
    there[rows, objects] = True
    absent = found.logits.max(dim=1).values[~there]
    return Measures(
        objects=len(rows),
        pointing=float(inside.gather(1, best[:, None]).float().mean()),
        recall=float((box_iou(corners(true), corners(found.boxes[rows, best])).diagonal() >= 0.5).float().mean()),
        presence=_auroc(highest, absent),
    )


def _auroc(positive: Float[Tensor, " sample"], negative: Float[Tensor, " sample"]) -> float:
    """Return the chance that a positive one stands above a negative one, ties half."""
    negative = negative.sort().values
    below, not_above = (torch.searchsorted(negative, positive, right=right) for right in (False, True))
    return float((below + not_above).double().mean() / 2 / len(negative))
