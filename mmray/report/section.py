"""What a feature adds to a report: its page's data, and the pictures that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmray.runs.run import Run


@dataclass(frozen=True)
class Request:
    """What a report is asked for."""

    run: Run
    edits: Sequence[str] = ()
    """Folders of edits to show, next to those in the run."""


@dataclass(frozen=True)
class Section:
    """A feature's part in a report."""

    page: Any
    """Lists and numbers for its script, which finds them as `INDEX[feature]`."""
    samples: Sequence[str] = ()
    """Samples of the run whose images the page shows."""
    elsewhere: Sequence[tuple[str, frozenset[str]]] = ()
    """Samples of other data whose images it shows, by the data."""
