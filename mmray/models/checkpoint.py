"""A checkpoint's files, and checks of its configuration before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mmray.errors import InputError

WEIGHTS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
"""Suffixes of the files that define a checkpoint, including its own code; its digest covers them."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Files that map each weight to its file."""
FOLDERS = ("qformer_tokenizer", "additional_chat_templates")
"""Subfolders that processors read."""

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Settings (also with a leading underscore) that may name kernels on the hub: native code, downloaded and run."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
MOST_LAYERS = 1_000
"""Most layers of a configuration: building the modules of more would take minutes to hours."""


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Return the checkpoint's files by their names below the folder, sorted.

    Raises InputError if an index names weights outside the folder, or a missing file.
    """
    folders = (folder, *(folder / name for name in FOLDERS if (folder / name).is_dir()))
    paths = [path for parent in folders for path in parent.iterdir() if path.suffix in WEIGHTS and path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    for index in INDEXES:
        if index in files:
            files |= {name: folder / name for name in _indexed(folder, index)}
    return dict(sorted(files.items()))


def check_config(folder: Path) -> None:
    """Raise InputError if the checkpoint would load foreign code or weights, or would not finish loading."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: an adapter, not a complete checkpoint; merge it into its base model first")
    # At any depth: vision and text parts have configurations of their own.
    for key, value in _items(_read(folder / "config.json")):
        name = key.removeprefix("_")
        if name in IMPLEMENTATIONS and isinstance(value, str) and "/" in value:
            raise InputError(
                f"{folder}: config.json asks for kernels of the hub ({key}: {value[:80]}); remove that line"
            )
        if name in DEPTHS and isinstance(value, int) and value > MOST_LAYERS:
            raise InputError(f"{folder}: config.json has {key}: {value}; at most {MOST_LAYERS:,} layers are supported")


def reads_images(config: PretrainedConfig) -> bool:
    """Return whether a model takes images: False for what transformers knows as a causal language model alone."""
    kind = config.model_type
    return kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _indexed(folder: Path, index: str) -> list[str]:
    content = _read(folder / index)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise InputError(f"{folder}: {index} has no weight_map; copy the checkpoint again")
    names = sorted(set(weights.values()))
    for name in names:
        # Only the name is checked: files in the hub's cache are links to a folder of blobs next to this one.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{folder}: {index} names {name}, outside the folder; give a complete checkpoint folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name}, which {index} names, is missing; copy the checkpoint again")
    return names


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.parent}: {path.name} can't be read ({' '.join(str(error).split())[:100]})") from error


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth."""
    # Not recursive: a hostile file may be nested deeper than Python's stack.
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield from value.items()
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
