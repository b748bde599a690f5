"""What the folder of an analysis says of itself: its settings, and what its rows depend on."""

from __future__ import annotations

from typing import Any, Protocol

from mmray.results.run import Run
from mmray.version import VERSION


class Analysis(Protocol):
    """Typed settings that know which of them their rows depend on."""

    def model_dump(self, *, exclude: set[str]) -> dict[str, Any]:
        """Return all settings but those excluded."""

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that rows depend on."""

    def fingerprint(self, digests: dict[str, str]) -> str:
        """Return a digest of those and of what they name."""


def described(settings: Analysis, digests: dict[str, str], units: int) -> dict[str, Any]:
    """Return what `RunFolder.begin` is given: settings, digests, their fingerprint, units of work, and the version."""
    return {
        "settings": settings.model_dump(exclude={"address"}),
        "result_settings": settings.result_settings(),
        "digests": digests,
        "fingerprint": settings.fingerprint(digests),
        "shards": units,
        "versions": {"mmray": VERSION},
    }


def digests_of(run: Run) -> dict[str, str]:
    """Return what tells a run's finished tables from those of any other, or of the same one grown."""
    finished = run.folder.finished() or {}
    return {"run": run.info["fingerprint"], "receipts": str(finished.get("receipts"))}
