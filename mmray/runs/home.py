"""Where a run was begun: the folder that relative paths in its settings are relative to, wherever a command runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

COCO_WITH_IMAGES = re.compile(r"(.+\.json):(.+)")
"""DATA that names COCO captions and, after a colon, the folder of their images."""
NOUN_SOURCES = frozenset({"auto", "objects", "textblob"})
"""Values of `nouns` that are not a file."""


def resolve_path(path: str, home: str) -> str:
    """Return a local path as it is from anywhere: a relative one is relative to `home`.

    Absolute paths, `~` and URIs stay as they are. So does every path if `home` is not a folder on this machine.
    """
    if "://" in path or path.startswith(("/", "~")) or not Path(home).is_dir():
        return path
    return str(Path(home) / path)


def resolve_data(data: str, home: str) -> str:
    """Return DATA with its paths as they are from anywhere; see `resolve_path`."""
    if data == "demo":
        return data
    if data.startswith("hf:"):
        # A folder, or else a name on the hub; a split may follow.
        folder, colon, split = data.removeprefix("hf:").partition(":")
        found = resolve_path(folder, home)
        return f"hf:{found}{colon}{split}" if Path(found).is_dir() else data
    if match := COCO_WITH_IMAGES.fullmatch(data):
        return ":".join(resolve_path(path, home) for path in match.groups())
    return resolve_path(data, home)


def resolve_settings(settings: dict[str, Any], home: str) -> dict[str, Any]:
    """Return the settings of a run's census with its paths as they are from anywhere."""
    found = settings | {"data": resolve_data(settings["data"], home)}
    # Runs record a model's full path; earlier versions recorded what was typed, which may be an id on the hub.
    model = resolve_path(settings["model"], home)
    found["model"] = model if Path(model).is_dir() else settings["model"]
    if settings.get("nouns", "auto") not in NOUN_SOURCES:
        found["nouns"] = resolve_path(settings["nouns"], home)
    return found
