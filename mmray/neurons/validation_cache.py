"""Which checkpoints were proven on this machine already, so that loading one again does not prove it again.

A note is an empty file in the cache, named by all that the proof depends on: the checkpoint's files by name, size and
time, the parts that were found, the number format and device, and the versions of what computes. A file that changes
makes another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import torch
import transformers

from mmray.models.checkpoint import checkpoint_files
from mmray.models.loading import LoadedModel
from mmray.version import VERSION


def is_validated(model: LoadedModel) -> bool:
    """Return whether the model was proven before, as it is now."""
    return _note(model).is_file()


def remember(model: LoadedModel) -> None:
    """Note that the model is proven; where there is no place to write, it will be proven again."""
    note = _note(model)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _note(model: LoadedModel) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mmray" / "proven" / fingerprint(model)


def fingerprint(model: LoadedModel) -> str:
    """Return a digest of all that a proof depends on."""
    files = checkpoint_files(model.folder.resolve())
    facts = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()]
    # A part that is kept in another format than the rest, as the BLIPs' queries are, does not stand for all.
    formats = sorted({str(weight.dtype) for weight in model.network.parameters()})
    whole = (str(model.folder.resolve()), facts, formats, model.device.type, repr(model.parts))
    versions = (VERSION, torch.__version__, transformers.__version__)
    return hashlib.sha256(repr((whole, versions)).encode()).hexdigest()[:32]
