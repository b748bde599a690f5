"""What a data set of the hub says that its files are: `datasets` would read, or request, any path or address."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmray.data.places import leaves, link_homes
from mmray.errors import InputError

CARD, YAML = "README.md", ".huggingface.yaml"


def check_files(name: str) -> None:
    """Raise `InputError` if a data set, by its name or its folder, names or links files that are not its own."""
    folder = Path(name)
    local = folder.is_dir()
    named = [*(_of_card(name, local)), *(_of_saved(folder) if local else ())]
    for path in named:
        if _is_foreign(path.removeprefix(f"hf://datasets/{name}/")):
            raise InputError(f"hf:{name}: names {path!r} as a file, which is not its own; fetch it, and name your copy")
    if local:
        homes = link_homes(folder.resolve())
        for link in _links(folder):
            if leaves(link, homes):
                raise InputError(f"hf:{name}: {link.relative_to(folder)} is a link out of it; copy what it links to")


def _is_foreign(path: str) -> bool:
    plain = PurePosixPath(path)
    return "://" in path or "::" in path or plain.is_absolute() or ".." in plain.parts or path.startswith("~")


def _of_card(name: str, local: bool) -> Iterator[str]:
    """Yield the files and folders that the configurations in a data set's card name."""
    import yaml
    from huggingface_hub import DatasetCard

    for file in (CARD, YAML):
        path = Path(name) / file if local else _fetched(name, file)
        if path is None or not path.is_file():
            continue
        try:
            facts = DatasetCard.load(path).data.to_dict() if file == CARD else yaml.safe_load(path.read_bytes())
        except (ValueError, yaml.YAMLError):
            continue  # `datasets` refuses it, too
        configurations = facts.get("configs") if isinstance(facts, dict) else None
        for found in configurations if isinstance(configurations, list) else ():
            yield from _texts([found.get("data_files"), found.get("data_dir")] if isinstance(found, dict) else ())


def _fetched(name: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (EntryNotFoundError, OSError, ValueError):
        return None  # there is none; or none of its files can be had either, which `datasets` says better


def _of_saved(folder: Path) -> Iterator[str]:
    """Yield the files and folders that a saved data set names."""
    for path in (folder / "dataset_dict.json", *folder.glob("state.json"), *folder.glob("*/state.json")):
        try:
            facts = json.loads(path.read_bytes())
            yield from _texts([facts.get("splits"), [file["filename"] for file in facts.get("_data_files") or ()]])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # as above


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in nested lists and dicts; of a dict its values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _links(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (path := Path(parent) / name).is_symlink():
                yield path
