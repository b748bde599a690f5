"""What a feature adds to a report: the data of its page, and the pictures on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmray.runs.run import Run


@dataclass(frozen=True)
class Request:
    """What a section is made from."""

    run: Run
    edits: Sequence[str] = ()
    """Folders of edits to show, in addition to those in the run."""


@dataclass(frozen=True)
class Section:
    """A feature's part in a report."""

    page: Any
    """Lists and numbers, which its script finds as `INDEX[feature]`."""
    samples: Sequence[str] = ()
    """Samples of the run whose images the page shows."""
    elsewhere: Sequence[tuple[str, frozenset[str]]] = ()
    """Data, and its samples whose images the page shows, for data other than the run's."""
