"""Nouns that strike the process which looks for them in a certain caption; they reach workers with the settings."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmray.features.census import inputs
from mmray.neurons.concepts import Mention, NounSource

SETTINGS: dict[str, Any] = {"model": "demo", "data": "demo", "limit": 96, "shard_size": 32}
"""The census that tests of this room repeat in different ways."""


@dataclass(frozen=True)
class Fault:
    """Strikes at a caption: raises, or kills the process that reads the caption."""

    caption: str
    raises: str = ""
    once: Path | None = None
    """File that is made by the first stroke, and stops further ones."""

    def strike(self) -> None:
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        if self.raises:
            raise RuntimeError(self.raises)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FaultyNouns(NounSource):
    """The nouns as they are, found by one who does not always live to tell."""

    faults: tuple[Fault, ...] = ()

    def find(self, caption: str, *rest: Any, **options: Any) -> list[Mention]:
        for fault in self.faults:
            if fault.caption == caption:
                fault.strike()
        return super().find(caption, *rest, **options)


def faulty(*faults: Fault) -> Any:
    """Make the census's driver hand these faults to its workers."""
    made: Callable[..., NounSource] = inputs.noun_source
    return patch.object(inputs, "noun_source", lambda *given: FaultyNouns(**vars(made(*given)), faults=faults))
