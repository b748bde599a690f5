"""Scenes of known objects: sample their layout, and render them as images.

A scene holds one to three drawings on a plain background:

    single           row              column
    ┌──────────┐     ┌──────────┐     ┌──────────┐
    │  ┌────┐  │     │┌───┐     │     │    ┌───┐ │
    │  │ a  │  │     ││ a │┌───┐│     │    │ a │ │
    │  │    │  │     │└───┘│ b ││     │ ┌──┴┬──┘ │
    │  └────┘  │     │     └───┘│     │ │ b │    │
    └──────────┘     └──────────┘     └─┴───┴────┘
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal, Self

import numpy
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from mmray.demo import CONCEPTS, SPRITES

SIZE: int = 96
"""Side of an image, in pixels."""

DOMAINS: tuple[str, ...] = ("noto", "fluent", "openmoji", "lineart")
"""Drawing styles, in the order of the sprites."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "red": (225, 120, 115),
    "orange": (245, 190, 120),
    "yellow": (245, 232, 140),
    "green": (150, 210, 150),
    "blue": (145, 185, 235),
    "purple": (195, 165, 225),
    "pink": (245, 190, 210),
    "brown": (185, 150, 120),
}
"""Red, green and blue of each background, 0 to 255."""

COMPANIONS: dict[str, str] = {
    "pizza": "spaghetti",
    "hammer": "screwdriver",
    "cat": "mouse",
    "sun": "sunglasses",
    "teapot": "cookie",
    "guitar": "drum",
    "crown": "ring",
    "ship": "anchor",
}
"""The planted hallucination: noisy captions of a scene with the key claim the value, though it is absent."""

Layout = Literal["single", "row", "column"]
Box = tuple[float, float, float, float]
"""Left, top, width and height, as fractions of the image's side."""


@dataclass(frozen=True)
class Concept:
    """A concept's kind ("food"), and its name by language code."""

    kind: str
    names: dict[str, str]


@dataclass(frozen=True)
class Scene:
    """The description of an image: enough to render it, caption it and ask questions about it.

    Objects (English names), boxes, angles (radians) and mirrored are parallel, left to right or top to bottom. A box is
    that of the upright drawing; a rotated drawing may extend beyond its edges by 11 % of the width.
    """

    objects: tuple[str, ...]
    layout: Layout
    boxes: tuple[Box, ...]
    domain: str
    background: str
    angles: tuple[float, ...]
    mirrored: tuple[bool, ...]
    noise_seed: int


@cache
def load_concepts() -> dict[str, Concept]:
    """Return all concepts by English name, in the order of the sprites."""
    rows = json.loads(CONCEPTS.read_text(encoding="utf-8"))
    return {row["concept"]: Concept(kind=row["kind"], names=row["names"]) for row in rows}


def sample_scene(random: Random) -> Scene:
    """Sample a scene; scenes with a key of `COMPANIONS` are frequent, and half of them have the companion."""
    objects = _sample_objects(random)
    layout: Layout = "single" if len(objects) == 1 else random.choice(("row", "column"))
    boxes = _sample_boxes(len(objects), layout, random)
    return Scene(
        objects=tuple(objects),
        layout=layout,
        boxes=tuple(boxes),
        domain=random.choice(DOMAINS),
        background=random.choice(tuple(BACKGROUNDS)),
        angles=tuple(random.uniform(-0.25, 0.25) for _ in objects),
        mirrored=tuple(random.random() < 0.5 for _ in objects),
        noise_seed=random.getrandbits(31),
    )


def _sample_objects(random: Random) -> list[str]:
    """Sample one to three different objects."""
    count = random.choices((1, 2, 3), weights=(4, 4, 2))[0]
    objects = random.sample(tuple(load_concepts()), count)
    # Concepts with companions are oversampled, so that the planted hallucination is learnt.
    if count < 3 and random.random() < 0.15:
        claimant = random.choice(tuple(COMPANIONS))
        others = [name for name in objects if name not in (claimant, COMPANIONS[claimant])]
        objects = [claimant, *others[: count - 1]]
    companion = COMPANIONS.get(objects[0])
    if random.random() < 0.5 and companion is not None and len(objects) < 3 and companion not in objects:
        objects.append(companion)
    # Otherwise a companion would always come last.
    random.shuffle(objects)
    return objects


def _sample_boxes(count: int, layout: Layout, random: Random) -> list[Box]:
    """Sample square boxes of equal size that neither overlap nor leave the image."""
    if layout == "single":
        side = random.uniform(0.5, 0.9)
        slack = 0.8 * (1 - side) / 2
        centres = [(0.5, 0.5)]
    else:
        side = random.uniform(0.8, 1.0) / count
        slack = (1 / count - side) / 2
        along = [(index + 0.5) / count for index in range(count)]
        across = [random.uniform(side / 2, 1 - side / 2) for _ in along]
        centres = list(zip(along, across, strict=True) if layout == "row" else zip(across, along, strict=True))
    boxes = []
    for across_centre, down_centre in centres:
        left = across_centre - side / 2 + random.uniform(-slack, slack)
        top = down_centre - side / 2 + (0.0 if layout == "row" else random.uniform(-slack, slack))
        boxes.append((min(max(left, 0.0), 1 - side), min(max(top, 0.0), 1 - side), side, side))
    return boxes


@dataclass(frozen=True)
class World:
    """Renders scenes from drawings, on one device."""

    sprites: UInt8[Tensor, "concept domain 4 height width"]
    """Red, green, blue and opacity."""

    @classmethod
    def load(cls, device: torch.device | None = None) -> Self:
        """Return the world of the packaged drawings on a device (by default PyTorch's)."""
        with numpy.load(SPRITES) as archive:
            sprites = torch.as_tensor(archive["sprites"], device=device)
        return cls(sprites.permute(0, 1, 4, 2, 3))

    def sample(self, count: int, seed: int) -> list[Scene]:
        """Return the first `count` scenes of a seed."""
        random = Random(seed)
        return [sample_scene(random) for _ in range(count)]

    def render(self, scenes: Sequence[Scene]) -> UInt8[Tensor, "scene 3 size size"]:
        """Return the images of one or more scenes, on the world's device."""
        images = self._backdrops(scenes)
        for index in range(max(len(scene.objects) for scene in scenes)):
            rows = [row for row, scene in enumerate(scenes) if index < len(scene.objects)]
            drawings = self._drawings([scenes[row] for row in rows], index)
            opacity = drawings[:, 3:] / 255
            images[rows] = images[rows] * (1 - opacity) + drawings[:, :3] * opacity
        return images.clamp(0, 255).to(torch.uint8)

    def _backdrops(self, scenes: Sequence[Scene]) -> Float[Tensor, "scene 3 size size"]:
        """Return plain backgrounds with a gradient of shade and grain."""
        device = self.sprites.device
        colours = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)[..., None, None]
        noise = _normal_noise(torch.tensor([scene.noise_seed for scene in scenes], device=device), 2 + SIZE * SIZE)
        ramp = torch.linspace(-1, 1, SIZE, device=device)
        shade = noise[:, 0, None, None] * ramp[:, None] + noise[:, 1, None, None] * ramp
        grain = noise[:, 2:].reshape(-1, SIZE, SIZE)
        return colours + (14 * shade + 5 * grain)[:, None]

    def _drawings(self, scenes: Sequence[Scene], index: int) -> Float[Tensor, "scene 4 size size"]:
        """Return the object with this index of each scene, rotated, mirrored and moved to its box."""
        device = self.sprites.device
        concept_order = list(load_concepts())
        concepts = [concept_order.index(scene.objects[index]) for scene in scenes]
        domains = [DOMAINS.index(scene.domain) for scene in scenes]
        drawings = self.sprites[concepts, domains].float()

        left, top, width, height = torch.tensor([scene.boxes[index] for scene in scenes], device=device).unbind(1)
        angles = torch.tensor([scene.angles[index] for scene in scenes], device=device)
        mirror = torch.tensor([-1.0 if scene.mirrored[index] else 1.0 for scene in scenes], device=device)
        # `affine_grid` takes the inverse map, from pixels of the image to those of the drawing, both in -1..1.
        centre_x, centre_y = 2 * left + width - 1, 2 * top + height - 1
        # Divided by the box's size, because the drawing spans -1..1 within its box.
        cosine, sine = angles.cos() / width, angles.sin() / height
        drawing_x = mirror * torch.stack((cosine, sine, -cosine * centre_x - sine * centre_y))
        drawing_y = torch.stack((-sine, cosine, sine * centre_x - cosine * centre_y))
        inverse = torch.stack((drawing_x, drawing_y)).permute(2, 0, 1)
        grid = functional.affine_grid(inverse, [len(scenes), 4, SIZE, SIZE], align_corners=False)
        return functional.grid_sample(drawings, grid, align_corners=False)


def _normal_noise(seeds: Int64[Tensor, " scene"], count: int) -> Float32[Tensor, "scene count"]:
    """Return standard normal noise that depends only on each scene's seed, not on the batch or the device."""
    # A counter-based generator: PyTorch's generators would draw one stream for the whole batch.
    mixed = _mix(_mix(seeds)[:, None] + torch.arange(count, device=seeds.device))
    uniform = ((mixed >> 9).float() + 0.5) / (1 << 23)  # 23 bits plus a half: exact in fp32, and never 0 or 1
    noise: Tensor = torch.special.ndtri(uniform)
    return noise


def _mix(numbers: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Hash 32-bit integers (`lowbias32` by C. Wellons)."""
    numbers = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)
