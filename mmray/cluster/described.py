"""What the folder of an analysis says of itself: its settings, and what its rows depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import mmray.demo
from mmray.perception.joint import DEMO
from mmray.results.run import Run
from mmray.storage import open_store
from mmray.version import VERSION


class Analysis(Protocol):
    """Typed settings that know which of them their rows depend on."""

    def model_dump(self, *, exclude: set[str]) -> dict[str, Any]:
        """Return all settings but those excluded."""

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that rows depend on."""

    def fingerprint(self, digests: dict[str, str]) -> str:
        """Return a digest of those and of what they name."""


def described(settings: Analysis, digests: dict[str, str]) -> dict[str, Any]:
    """Return what `RunFolder.begin` is given: settings, digests, the fingerprint of both, and the version."""
    return {
        "settings": settings.model_dump(exclude={"address"}),
        "result_settings": settings.result_settings(),
        "digests": digests,
        "fingerprint": settings.fingerprint(digests),
        "versions": {"mmray": VERSION},
    }


def digests_of(run: Run) -> dict[str, str]:
    """Return what tells a run's finished tables from those of any other, or of the same one grown."""
    finished = run.folder.finished() or {}
    return {"run": run.info["fingerprint"], "receipts": str(finished.get("receipts"))}


def content_of(place: Path | str) -> str:
    """Return a digest of a folder's files; of a hub id its name."""
    if "://" not in str(place) and not Path(place).expanduser().is_dir():
        return str(place)
    listed = [(entry.key, entry.size, entry.version) for entry in open_store(place).list() if "/" not in entry.key]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def detector_content(detector: str) -> str:
    """Return a digest of a detector's files, those of the demo's where it is that."""
    return content_of(mmray.demo.DETECTOR if detector == DEMO else detector)
