"""What every source hands on: a sample, or the reason why there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from mmray.data.image_keys import image_key

BACKGROUND = "white"
"""What shows behind transparent pixels."""


@dataclass(frozen=True)
class Sample:
    """One image with its caption, as stored: the image is still encoded (JPEG, PNG, …).

    `image` is None for text-only data. `boxes` are (x, y, width, height) in 0..1 of the image, in the order of
    `objects`; `questions` are (question, answer) pairs; `labels` holds further label columns asked for by name;
    `references` are all captions that people gave the image, where a row tells (COCO, lists of captions); `source` says
    where the sample was read, for messages; `background` is the colour behind transparent pixels.
    """

    sample_id: str
    source: str
    image: bytes | None
    caption: str
    language: str | None = None
    domain: str | None = None
    objects: tuple[str, ...] | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    questions: tuple[tuple[str, str], ...] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    background: str = BACKGROUND
    references: tuple[str, ...] = ()

    @cached_property
    def image_key(self) -> str:
        """Key of the image, which all samples of it share."""
        return image_key(self.sample_id, image_digest(self.image))

    def boxes_of(
        self, concept: str, translations: Mapping[str, Mapping[str, str]]
    ) -> tuple[str, list[tuple[float, ...]]]:
        """Return the name in `objects` of what a concept names in the sample's language, and its boxes, if it has any.

        `translations`: object names by language, of each of `objects`.
        """
        for name in dict.fromkeys(self.objects or ()):
            called = translations.get(name, {}).get(self.language or "", name)
            if concept in (name.casefold(), called.casefold()):
                pairs = zip(self.objects or (), self.boxes or (), strict=False)
                return name, [box for own, box in pairs if own == name]
        return concept, []


@dataclass(frozen=True)
class Failure:
    """One sample that could not be used: which, from where, at which stage (read, decode, …), and why."""

    sample_id: str
    source: str
    stage: str
    message: str


def image_digest(image: bytes | None) -> str | None:
    """Return what tells an image from others, 16 hexadecimal digits of its bytes; None without one."""
    return None if image is None else hashlib.sha256(image).hexdigest()[:16]


def digest_id(image: bytes | None, caption: str) -> str:
    """Return the identifier of a sample that has none: 16 hexadecimal digits of its image bytes and caption."""
    digest = hashlib.sha256(image or b"")
    digest.update(b"\0" + caption.encode())
    return digest.hexdigest()[:16]
