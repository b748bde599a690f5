"""Nouns that strike the process which looks for them in a certain caption: they reach every worker with the settings.

python -m tests.cluster.faults OUT CAPTION     a census whose driver is killed by the worker that meets the caption
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from mmray.cluster import census
from mmray.neurons.concepts import Mention, NounSource
from mmray.settings import census_settings

SETTINGS: dict[str, Any] = {"model": "demo", "data": "demo", "limit": 96, "shard_size": 32}
"""The census that tests of this room repeat in different ways."""


@dataclass(frozen=True)
class Fault:
    """Strikes at a caption: raises, or kills the process `target` (0: the one that reads the caption)."""

    caption: str
    raises: str = ""
    target: int = 0
    once: Path | None = None
    """File that is made by the first stroke, and stops further ones."""

    def strike(self) -> None:
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        if self.raises:
            raise RuntimeError(self.raises)
        os.kill(self.target or os.getpid(), signal.SIGKILL)


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
    made: Callable[..., NounSource] = census.noun_source
    return patch.object(census, "noun_source", lambda *given: FaultyNouns(**vars(made(*given)), faults=faults))


def main() -> NoReturn:
    out, caption = sys.argv[1:]
    # By its full name: a class of `__main__` could not be found by the workers.
    from tests.cluster import faults

    with faults.faulty(faults.Fault(caption, target=os.getpid())):
        census.run_census(census_settings(SETTINGS | {"out": out, "workers": 1}))
    raise SystemExit("the driver was not killed")


if __name__ == "__main__":
    main()
