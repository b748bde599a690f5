"""Remember which checkpoints were validated on this machine, so that loading one again does not validate it again.

A marker is an empty file in the cache. Its name is a digest of everything that validation depends on: the checkpoint's
files by name, size and time, the parts found, dtypes and device, and the versions of the libraries.
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
    """Return whether the model, as it is now, was validated before."""
    return _marker(model).is_file()


def remember(model: LoadedModel) -> None:
    """Mark the model as validated."""
    marker = _marker(model)
    # A cache that can't be written costs another validation, and nothing else.
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _marker(model: LoadedModel) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mmray" / "proven" / fingerprint(model)


def fingerprint(model: LoadedModel) -> str:
    """Return a digest of everything that validation depends on."""
    # By size and time: hashing the weights would take longer than validation.
    files = checkpoint_files(model.folder.resolve())
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()]
    # All dtypes: some parts, such as the BLIPs' queries, stay in another one than the rest.
    dtypes = sorted({str(weight.dtype) for weight in model.network.parameters()})
    content = (str(model.folder.resolve()), stats, dtypes, model.device.type, repr(model.parts))
    versions = (VERSION, torch.__version__, transformers.__version__)
    return hashlib.sha256(repr((content, versions)).encode()).hexdigest()[:32]
