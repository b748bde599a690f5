"""Train a detector's heads on a frozen vision tower for a given time, on rendered scenes, and measure them."""

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
"""Seed of the first chunk of training scenes; later chunks count up from it."""
TEST_SEED = 990_000
"""Seed of the test scenes."""
_BATCHES = 16
"""Batches of scenes that are rendered and embedded at a time."""
_KEPT = 48
"""Chunks of embeddings that are kept for replay."""
_MOST_OBJECTS = 3
_WARM_UP_STEPS = 100
_BOX_WEIGHT = 4.0
MAX_RADIUS = 0.8
"""Largest adversarial perturbation, as a fraction of an embedding's norm."""
ATTACK_STEPS, _OVERSHOOT = 3, 1.3
"""Steps of an attack, and the total length of its steps relative to its radius: a curved path still gets there."""

_log = logging.getLogger(__name__)


Embeddings = Float[Tensor, "scene patch width"]


class Chunk(NamedTuple):
    """Embeddings of scenes in half precision, with indices (-1: none) and boxes of their objects."""

    embeddings: Embeddings
    objects: Int[Tensor, "scene object"]
    boxes: Float[Tensor, "scene object 4"]


@dataclass(frozen=True)
class Words:
    """Embeddings of the concepts' names in all languages."""

    embeddings: Float[Tensor, "concept language embedding"]

    @classmethod
    def of(cls, heads: Heads) -> Words:
        """Embed the names of all concepts."""
        concepts = load_concepts().values()
        languages = list(next(iter(concepts)).names)
        rows = [heads.word_embeddings([concept.names[language] for language in languages]) for concept in concepts]
        return cls(torch.stack(rows))

    def draw(self) -> Float[Tensor, "concept embedding"]:
        """Return each concept's embedding in a random language, in half of the cases English (the first)."""
        concepts, languages, _ = self.embeddings.shape
        drawn = torch.randint(0, 2 * languages - 1, (concepts,)) - languages + 1
        return self.embeddings[torch.arange(concepts), drawn.clamp(min=0)]


@torch.no_grad()
def embed_scenes(tower: OwnTower, world: World, scenes: Sequence[Scene], *, quick: bool = False) -> Chunk:
    """Render scenes and run the tower over them; `quick` uses bf16, which is good enough for training."""
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
    """Train heads in place until the time is up; return the number of scenes that they have seen, `seen` included.

    New scenes are rendered during the first two thirds of the time, and each is trained on several times. The last
    third adds adversarial training on perturbed embeddings (Madry et al. 2018). Gradients of robust heads show what
    objects look like, instead of what fools only the heads (Santurkar et al. 2019, "Image Synthesis with a Single
    (Robust) Classifier"). The learning rate is a cosine of the elapsed time, so that no two runs are equal.
    """
    words = Words.of(heads)
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=0.02, betas=(0.9, 0.98))
    heads.train()
    start, step, average_loss = time.monotonic(), 0, 0.0
    size = _BATCHES * batch_size
    # Continue with unseen scenes when existing heads are trained further.
    chunks = _chunks(tower, size, SEED + -(-seen // size))
    kept: list[Chunk] = []
    rendered = seen
    while (elapsed := time.monotonic() - start) < seconds:
        adversarial = elapsed >= 0.67 * seconds
        if not kept or not adversarial:
            kept = [*kept[-_KEPT + 1 :], next(chunks)]
            rendered += size
        for _ in range(2 * _BATCHES):
            progress = min(1.0, (time.monotonic() - start) / seconds)
            # Decay by time instead of steps, so that any machine finishes the schedule.
            cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / _WARM_UP_STEPS) * cosine
            chunk = kept[int(torch.randint(len(kept), ()))]
            rows = torch.randint(len(chunk.objects), (batch_size,))
            batch = Chunk(*(tensor[rows.to(tensor.device)] for tensor in chunk))
            loss = train_on(heads, batch, words.draw(), adversarial=adversarial)
            clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average_loss += (loss - average_loss) * max(0.02, 1 / (step + 1))
            step += 1
        _log.info("step %d: loss %.3f, %d scenes, %.0f s", step, average_loss, rendered, time.monotonic() - start)
    heads.eval()
    return rendered


def train_on(heads: Heads, batch: Chunk, words: Float[Tensor, "concept embedding"], *, adversarial: bool) -> float:
    """Accumulate gradients of a batch, plus those of its attacked copy if `adversarial`; return the clean loss."""
    queries = heads.project(words)

    def loss_of(embeddings: Embeddings, queries: Float[Tensor, "concept dim"]) -> Float[Tensor, ""]:
        with torch.autocast(heads.place.device.type, torch.bfloat16):
            found = heads(embeddings, queries)
        return detection_loss(Detection(*(part.float() for part in found)), batch, heads.shape["side"])

    start = batch.embeddings.float()
    total = clean = loss_of(start, queries)
    if adversarial:
        fixed = queries.detach()  # the attack changes embeddings, not words
        total = clean + loss_of(_attack(start, lambda embeddings: loss_of(embeddings, fixed)), queries)
    total.backward()  # type: ignore[no-untyped-call]
    return clean.item()


def _attack(start: Embeddings, loss_of: Callable[[Embeddings], Float[Tensor, ""]]) -> Embeddings:
    """Return embeddings perturbed along their loss's gradient, each within a random radius up to `MAX_RADIUS`."""
    largest = MAX_RADIUS * start.flatten(1).norm(dim=1)[:, None, None]
    radius = largest * torch.rand_like(largest)
    move = torch.zeros_like(start)
    for _ in range(ATTACK_STEPS):
        leaf = (start + move).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
        move = move + _OVERSHOOT * radius / ATTACK_STEPS * _unit_length(gradient)
        # Project back onto the ball of the radius.
        move = move * (radius / move.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)).clamp(max=1)
    return start + move


def _unit_length(moves: Embeddings) -> Embeddings:
    return functional.normalize(moves.flatten(1), dim=1).reshape(moves.shape)


def _chunks(tower: OwnTower, size: int, seed: int) -> Iterator[Chunk]:
    world = World.load(tower.model.device)
    while True:
        yield embed_scenes(tower, world, world.sample(size, seed), quick=True)
        seed += 1


def detection_loss(found: Detection, batch: Chunk, side: int) -> Float[Tensor, ""]:
    """Return the loss of classes and boxes, averaged over the patches that belong to an object.

    A patch belongs to an object if its centre is in the object's box; boxes of a scene don't overlap.
    """
    inside = centres_inside(batch.boxes, side) & (batch.objects >= 0)[..., None]
    held = inside.any(dim=1)
    owner = inside.int().argmax(dim=1)
    target = torch.zeros_like(found.logits)
    rows, patches = held.nonzero(as_tuple=True)
    objects = owner[rows, patches]
    target[rows, patches, batch.objects[rows, objects]] = 1.0
    losses = functional.binary_cross_entropy_with_logits(found.logits, target, reduction="none")
    # The focal loss (Lin et al. 2017) gives less weight to confident predictions.
    surprise = (found.logits.sigmoid() - target).square()
    focal = (losses * surprise).sum() / len(rows)
    # A softmax over words, with the background at logit 0, speeds up learning.
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
    """Quality of heads on test scenes."""

    objects: int
    pointing: float
    """Fraction of objects in whose box is the centre of the patch with the highest logit for their name."""
    recall: float
    """Fraction of objects whose box has an IoU of at least 0.5 with that patch's box."""
    presence: float
    """AUROC of a scene's highest logit, for names of present against absent objects."""


@torch.no_grad()
def measure_heads(heads: Heads, tower: OwnTower, count: int = 512, seed: int = TEST_SEED) -> Measures:
    """Measure heads on test scenes with the English names of all concepts."""
    world = World.load(tower.model.device)
    chunk = embed_scenes(tower, world, world.sample(count, seed))
    names = list(load_concepts())
    found = heads(chunk.embeddings.float(), heads.queries(names))
    rows, places = (chunk.objects >= 0).nonzero(as_tuple=True)
    objects, true = chunk.objects[rows, places], chunk.boxes[rows, places]
    highest, best = found.logits[rows, :, objects].max(dim=1)
    inside = centres_inside(true[:, None], heads.shape["side"])[:, 0]
    present = torch.zeros(len(chunk.objects), len(names), dtype=torch.bool, device=highest.device)
    present[rows, objects] = True
    absent = found.logits.max(dim=1).values[~present]
    return Measures(
        objects=len(rows),
        pointing=float(inside.gather(1, best[:, None]).float().mean()),
        recall=float((box_iou(corners(true), corners(found.boxes[rows, best])).diagonal() >= 0.5).float().mean()),
        presence=_auroc(highest, absent),
    )


def _auroc(positive: Float[Tensor, " sample"], negative: Float[Tensor, " sample"]) -> float:
    """Return the probability that a positive score is above a negative one; ties count half."""
    negative = negative.sort().values
    below, not_above = (torch.searchsorted(negative, positive, right=right) for right in (False, True))
    return float((below + not_above).double().mean() / 2 / len(negative))
