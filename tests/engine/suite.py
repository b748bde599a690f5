"""Where the contract's tests run jobs, and what undisturbed runs of them left behind."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmray.engine import JobResult, Unit
from tests.engine.executors import Remembered, Results
from tests.engine.jobs import Case, Place


def each(cases: Iterable[Case]) -> Any:
    """Return a test's parameters: these jobs, the expensive ones marked as slow."""
    marked = [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in cases]
    return pytest.mark.parametrize("case", marked)


@dataclass
class Suite:
    """Where jobs are run, and what undisturbed runs of them left behind."""

    base: Place
    root: Path
    results: Results = field(default_factory=dict)
    references: dict[str, dict[str, Any]] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    """How many changes to storage an undisturbed run of a job makes."""
    places: int = 0

    def place(self) -> Place:
        """Return a fresh place."""
        self.places += 1
        return self.base.copy(self.root / str(self.places))

    def executor(self, case: Case, before: Callable[[Unit], None] = lambda _: None) -> Remembered:
        """Return what does the units of a job, from memory where that is enough."""
        return Remembered({} if case.saves else self.results, before)

    def run(self, case: Case, place: Place, **settings: Any) -> JobResult:
        """Run a job without disturbance."""
        self.reference(case)
        return case.run(place, self.executor(case), **settings)

    def reference(self, case: Case) -> dict[str, Any]:
        """Return what an undisturbed run of a job leaves behind: begun elsewhere, on a disk without hard links."""
        if case.name not in self.references:
            place = self.place()
            with elsewhere(self.root / "elsewhere"), without_links():
                result = case.run(place, self.executor(case))
            assert not result.quarantined
            self.references[case.name] = case.left(place, result)
        return self.references[case.name]

    def check(self, case: Case, place: Place, result: JobResult) -> None:
        """Fail unless a run left behind what an undisturbed one does."""
        left, expected = case.left(place, result), self.reference(case)
        assert left.keys() == expected.keys()
        for name, value in expected.items():
            assert left[name] == value, name
        assert not result.quarantined


@contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Be in another folder."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def without_links() -> Iterator[None]:
    """Be on a disk that has no hard links."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", refuse)
        yield
