"""Check which files a data set names as its own: `datasets` would read any path, and request any address."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmray.data.locations import escapes, link_roots
from mmray.errors import InputError

CARD, YAML = "README.md", ".huggingface.yaml"


def check_files(name: str) -> None:
    """Raise `InputError` if a data set, given by name or folder, names or links to files outside itself."""
    folder = Path(name)
    local = folder.is_dir()
    for path in (*_in_card(name, local), *(_in_state(folder) if local else ())):
        if _is_foreign(path.removeprefix(f"hf://datasets/{name}/")):
            raise InputError(f"hf:{name}: names {path!r} as a file, which is not its own; fetch it, and name your copy")
    if local:
        roots = link_roots(folder.resolve())
        # A cloned data set may hold links to any file of this machine.
        for link in _links(folder):
            if escapes(link, roots):
                raise InputError(f"hf:{name}: {link.relative_to(folder)} is a link out of it; copy what it links to")


def _is_foreign(path: str) -> bool:
    plain = PurePosixPath(path)
    return "://" in path or "::" in path or plain.is_absolute() or ".." in plain.parts or path.startswith("~")


def _in_card(name: str, local: bool) -> Iterator[str]:
    """Yield the files and folders that the data set's card names in its configurations."""
    import yaml
    from huggingface_hub import DatasetCard

    for file in (CARD, YAML):
        path = Path(name) / file if local else _fetched(name, file)
        if path is None or not path.is_file():
            continue
        try:
            card = DatasetCard.load(path).data.to_dict() if file == CARD else yaml.safe_load(path.read_bytes())
        except (ValueError, yaml.YAMLError):
            continue  # `datasets` refuses it too, with a better message.
        configs = card.get("configs") if isinstance(card, dict) else None
        for config in configs if isinstance(configs, list) else ():
            yield from _strings([config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else ())


def _fetched(name: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (EntryNotFoundError, OSError, ValueError):
        return None  # No such file; or no access to the data set, which `datasets` reports better.


def _in_state(folder: Path) -> Iterator[str]:
    """Yield the files and folders that a data set written by `save_to_disk` names."""
    for path in (folder / "dataset_dict.json", *folder.glob("state.json"), *folder.glob("*/state.json")):
        try:
            state = json.loads(path.read_bytes())
            yield from _strings([state.get("splits"), [file["filename"] for file in state.get("_data_files") or ()]])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # As above.


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in nested lists and in the values of nested dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _links(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (path := Path(parent) / name).is_symlink():
                yield path
