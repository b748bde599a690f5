"""What every source yields: samples, and failures that say why a row gave none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from mmray.data.image_keys import image_key

WINDOW_MARK = "#w"
"""Between the id of a text and the number of a window of it."""
BACKGROUND = "white"
"""Colour shown by transparent pixels."""


@dataclass(frozen=True)
class Sample:
    """One image with its caption."""

    sample_id: str
    source: str
    """Where the sample was read, for messages."""
    image: bytes | None
    """Still encoded (JPEG, PNG, …); None for text-only data."""
    caption: str
    language: str | None = None
    domain: str | None = None
    objects: tuple[str, ...] | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    """(x, y, width, height) in 0..1 of the image, in the order of `objects`."""
    questions: tuple[tuple[str, str], ...] | None = None
    """(question, answer) pairs."""
    question: str | None = None
    """What the caption answers, in data of visual question answering: its prompt."""
    answers: tuple[str, ...] = ()
    """All answers that people gave to `question`; the caption is the most frequent one."""
    labels: dict[str, str] = field(default_factory=dict)
    """Values of the columns named by `--label-column`."""
    background: str = BACKGROUND
    references: tuple[str, ...] = ()
    """All captions that people gave the image, where the data tells (COCO, lists of captions)."""
    text_digest: str | None = None
    """Of a window of a long text: digest of the whole text."""
    cue: str = ""
    """Beginning of a text, which a text-only model continues; the caption is the rest."""

    def asked(self, prompt: str | None) -> str | None:
        """Return what is asked before the caption: the sample's own question, if any, and then the prompt."""
        return prompt if self.question is None else "\n".join(part for part in (self.question, prompt) if part)

    @cached_property
    def digest(self) -> str | None:
        """Digest of what several samples share: an image, or the text that windows are cut from; None for neither."""
        return self.text_digest if self.image is None else image_digest(self.image)

    @cached_property
    def image_key(self) -> str:
        """Key of the image or long text, shared by all its samples."""
        return image_key(self.sample_id, self.digest)

    def window(self, number: int, text: str) -> Sample:
        """Return a window of a text without an image, as a sample of its own."""
        digest = digest_id(None, self.caption)
        return replace(
            self, sample_id=f"{self.sample_id}{WINDOW_MARK}{number}", caption=text, text_digest=digest, references=()
        )

    def boxes_of(
        self, concept: str, translations: Mapping[str, Mapping[str, str]]
    ) -> tuple[str, list[tuple[float, ...]]]:
        """Return the object that a concept names in the sample's language, and its boxes, if it has any.

        `translations` maps object → language → name. A concept that is no object of the image is returned as it is.
        """
        for name in dict.fromkeys(self.objects or ()):
            translated = translations.get(name, {}).get(self.language or "", name)
            if concept in (name.casefold(), translated.casefold()):
                pairs = zip(self.objects or (), self.boxes or (), strict=False)
                return name, [box for other, box in pairs if other == name]
        return concept, []


@dataclass(frozen=True)
class Failure:
    """A sample that could not be used: which one, where it was read, the stage that failed (read, decode, …), why."""

    sample_id: str
    source: str
    stage: str
    message: str


def text_id(sample_id: str) -> str:
    """Return the id of the text that a window is cut from; the id itself if it is not a window's."""
    text, _, number = sample_id.rpartition(WINDOW_MARK)
    return text if number.isdecimal() and text else sample_id


def image_digest(image: bytes | None) -> str | None:
    """Return an image's digest: 16 hexadecimal digits of the SHA-256 of its bytes; None without an image."""
    return None if image is None else hashlib.sha256(image).hexdigest()[:16]


def digest_id(image: bytes | None, caption: str) -> str:
    """Return an id for a sample without one: 16 hexadecimal digits of the SHA-256 of image bytes and caption."""
    digest = hashlib.sha256(image or b"")
    # The zero byte separates image and caption.
    digest.update(b"\0" + caption.encode())
    return digest.hexdigest()[:16]
