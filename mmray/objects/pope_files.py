"""Questions of POPE's released files (Li et al. 2023): JSON lines with the name of an image, a text, and yes or no."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mmray.errors import InputError
from mmray.objects.statistics import STRATEGIES
from mmray.storage import open_object

FILE = "file"
"""Strategy of questions whose file's name has none of STRATEGIES."""
LABELS = {"yes": True, "no": False}
FORM = '{"image": "COCO_val2014_000000016631.jpg", "text": "Is there a person in the image?", "label": "yes"}'
OBJECT = re.compile(r"^is there (?:an? )?(.+?) in (?:the|this) (?:image|picture|photo)\b", re.IGNORECASE)
NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class PopeQuestion:
    """A question about an image, as it is asked, and whether yes is right."""

    strategy: str
    """How absent objects were chosen, by the file's name: random, popular, adversarial or file."""
    text: str
    present: bool

    @property
    def thing(self) -> str:
        """The object asked about; the whole text where it has another form than POPE's."""
        found = OBJECT.match(self.text.strip())
        return found[1].casefold() if found else self.text


@dataclass(frozen=True)
class PopeFiles:
    """Questions by image, images in the order of the files."""

    folder: str
    """Where the first file is."""
    images: tuple[tuple[str, tuple[PopeQuestion, ...]], ...]

    @property
    def digest(self) -> str:
        """A digest of all questions."""
        return hashlib.sha256(repr(self.images).encode()).hexdigest()[:16]

    def by_key(self) -> dict[str, tuple[PopeQuestion, ...]]:
        """Return the questions by everything that may name their image; see `keys`."""
        return {key: questions for name, questions in self.images for key in keys(name)}


def keys(image: str) -> tuple[str, ...]:
    """Return what may name an image in data: its file, that without folder or ending, and COCO's number in it."""
    path = PurePosixPath(image)
    # COCO_val2014_000000016631 is image 16631, as COCO's annotations count.
    number = NUMBER.search(path.stem)
    return tuple(dict.fromkeys((image, path.name, path.stem, *((str(int(number[1])),) if number else ()))))


def read_pope(uris: Sequence[str]) -> PopeFiles:
    """Return the questions of files, each as often as it is there.

    Raises InputError for a missing file, an empty one, and a line of another form.
    """
    images: dict[str, list[PopeQuestion]] = {}
    for uri in uris:
        strategy = next((name for name in STRATEGIES if name in PurePosixPath(uri).name.lower()), FILE)
        for image, text, present in _lines(uri):
            images.setdefault(image, []).append(PopeQuestion(strategy, text, present))
    folder = open_object(uris[0])[0].uri
    return PopeFiles(folder, tuple((image, tuple(questions)) for image, questions in images.items()))


def _lines(uri: str) -> list[tuple[str, str, bool]]:
    store, name = open_object(uri)
    try:
        lines = store.read(name).decode().splitlines()
    except FileNotFoundError:
        raise InputError(f"--pope {uri}: no such file; give POPE's JSON lines, such as {FORM}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--pope {uri}: not UTF-8 ({error})") from None
    found = [_question(uri, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"--pope {uri}: no question in it; a line is such as {FORM}")
    return found


def _question(uri: str, number: int, line: str) -> tuple[str, str, bool]:
    try:
        row: Any = json.loads(line)
        image, text, label = row["image"], row["text"].strip(), LABELS[row["label"].strip().casefold()]
        if not isinstance(image, str) or not image or not text:
            raise ValueError(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--pope {uri}, line {number}: not a question such as {FORM}") from error
    return image, text, label
