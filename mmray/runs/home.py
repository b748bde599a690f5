"""Resolve relative paths in a run's settings against the folder where the run was begun (its home)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

COCO_WITH_IMAGES = re.compile(r"(.+\.json):(.+)")
"""DATA in the form CAPTIONS.json:IMAGE_FOLDER."""
# Those of `mmray.neurons.concepts`, which this room can't import.
NOUN_SOURCES = frozenset({"auto", "objects", "hanta", "textblob"})
"""Values of the setting `nouns` that are not a file."""


def resolve_path(path: str, home: str) -> str:
    """Return a local path resolved against `home`.

    Absolute paths, `~` and URIs stay the same. So does every path if `home` is not a folder on this machine.
    """
    if "://" in path or path.startswith(("/", "~")) or not Path(home).is_dir():
        return path
    return str(Path(home) / path)


def resolve_data(data: str, home: str) -> str:
    """Return DATA with its paths resolved against `home`; see `resolve_path`."""
    if data == "demo":
        return data
    if data.startswith("hf:"):
        # A folder or a name on the hub, with an optional split.
        folder, colon, split = data.removeprefix("hf:").partition(":")
        resolved = resolve_path(folder, home)
        return f"hf:{resolved}{colon}{split}" if Path(resolved).is_dir() else data
    if match := COCO_WITH_IMAGES.fullmatch(data):
        return ":".join(resolve_path(path, home) for path in match.groups())
    return resolve_path(data, home)


def resolve_settings(settings: dict[str, Any], home: str) -> dict[str, Any]:
    """Return the settings of a run's census with their paths resolved against `home`."""
    resolved = settings | {"data": resolve_data(settings["data"], home)}
    # Earlier versions recorded the model as typed, which may be an id on the hub; now it is a full path.
    model = resolve_path(settings["model"], home)
    resolved["model"] = model if Path(model).is_dir() else settings["model"]
    if settings.get("nouns", "auto") not in NOUN_SOURCES:
        resolved["nouns"] = resolve_path(settings["nouns"], home)
    return resolved
