"""Jobs side by side: each with workers of its own at the same time, each with the tables that it has alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmray.engine import LocalExecutor, Unit, UnitRefusedError, UnitResult, Worker, checked, run_side_by_side
from mmray.engine.ray import RayExecutor
from tests.support.letters import LINES, counted
from tests.support.words import LetterJob, LetterSettings

PATIENCE = 120.0
"""Seconds in which the other job's worker has to come; it needs a few to start."""


@dataclass(frozen=True)
class Meet:
    """A worker that does nothing before one of the other job has begun."""

    inner: Worker
    own: Path
    other: Path

    def __call__(self, unit: Unit) -> UnitResult:
        self.own.touch()
        until = time.monotonic() + PATIENCE
        while not self.other.exists():
            if time.monotonic() > until:
                raise UnitRefusedError("nobody came")
            time.sleep(0.05)
        return self.inner(unit)


class MeetingJob(LetterJob):
    """Counts letters once two of its kind are at work."""

    def worker(self, context: None) -> Worker:
        own = Path(self.settings.run)
        other = own.with_name({"one": "two", "two": "one"}[own.name])
        return Meet(super().worker(context), own / "here", other / "here")


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[type[LetterJob]], list[LetterJob]]:
    """Return what makes two jobs of a kind, in folders of their own."""
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    known = {"text": str(tmp_path / "text.txt")}
    return lambda kind: [
        kind(checked(LetterSettings, known | {"run": str(tmp_path / name)})) for name in ("one", "two")
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_on_ray_they_are_at_work_at_the_same_time(pair: Callable[[type[LetterJob]], list[LetterJob]]) -> None:
    jobs = pair(MeetingJob)
    told = []
    results = run_side_by_side(jobs, executor=RayExecutor((2, 2), None, None), follow=told.append)
    assert [result.quarantined for result in results] == [{}, {}]
    assert [counted(job)["n"] for job in jobs] == [[32, 32, 31]] * 2
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 2 * len(LINES), 2 * len(LINES))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_where_there_is_room_for_one_they_take_turns(pair: Callable[[type[LetterJob]], list[LetterJob]]) -> None:
    # The only worker of each asks for all cores.
    jobs = pair(LetterJob)
    results = run_side_by_side(jobs, executor=RayExecutor((1, 1), None, None))
    assert all(result.complete for result in results)
    assert [counted(job)["n"] for job in jobs] == [[32, 32, 31]] * 2


def test_what_fails_in_one_leaves_the_other_alone(pair: Callable[[type[LetterJob]], list[LetterJob]]) -> None:
    class Picky(LetterJob):
        def worker(self, context: None) -> Worker:
            def refuse(unit: Unit) -> UnitResult:
                raise UnitRefusedError("not mine")

            return refuse

    first, second = pair(LetterJob)
    whole, refused = run_side_by_side([first, Picky(second.settings)], executor=LocalExecutor())
    assert (whole.complete, len(refused.quarantined)) == (True, 10)
    assert counted(first)["n"] == [32, 32, 31]


def test_what_is_done_is_not_done_again(pair: Callable[[type[LetterJob]], list[LetterJob]]) -> None:
    first, second = pair(LetterJob)
    run_side_by_side([first], executor=LocalExecutor())
    again = run_side_by_side([first, second], executor=LocalExecutor())
    assert [result.already_done for result in again] == [True, False]
