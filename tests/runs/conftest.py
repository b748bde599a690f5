"""The command line in this process, and a small run for it to read: as it is, or with a toy analysis."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from mmray.engine import JobResult, Plan, Unit, UnitResult, Worker, checked
from mmray.engine import run as run_job
from mmray.features import FEATURES, Feature
from mmray.runs.run import Run, open_run
from tests.support.letters import LINES
from tests.support.words import LetterJob, LetterSettings


class CountJob(LetterJob):
    """The toy, on a census."""

    before: ClassVar[Callable[[Unit], None]] = staticmethod(lambda _: None)
    """What a test has it do before each unit."""

    def plan(self) -> Plan[None]:
        plan = super().plan()
        return Plan(plan.units, {**plan.digests, **open_run(self.settings.run).digests()}, plan.context)

    def worker(self, context: None) -> Worker:
        count = super().worker(context)

        def work(unit: Unit) -> UnitResult:
            type(self).before(unit)
            return count(unit)

        return work


@pytest.fixture
def census(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of this test's own, and a feature that it may have been analysed with."""
    monkeypatch.setitem(FEATURES, "letters", Feature("letters", (), "mmray letters RUN", ("letters", "total"), "lines"))
    # Other tests may have analysed the run that all share.
    others = shutil.ignore_patterns("edits", *(set(FEATURES) - {"census", "decoding"}))
    shutil.copytree(run.uri, tmp_path / "run", ignore=others)
    return str(tmp_path / "run")


@pytest.fixture
def count(census: str, tmp_path: Path) -> Callable[..., JobResult]:
    """Return what runs the toy on the census, with other settings where they are given."""
    (tmp_path / "text.txt").write_text("\n".join(LINES))

    def call(**settings: object) -> JobResult:
        asked = {"run": census, "text": str(tmp_path / "text.txt"), "local": True, **settings}
        return run_job(CountJob(checked(LetterSettings, asked)))

    return call


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Unit], None]], None]:
    """Return what has the toy's worker do something before each unit."""

    return lambda action: monkeypatch.setattr(CountJob, "before", staticmethod(action))
