"""A progress bar that follows commits; without a terminal, one plain line per minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from mmray.engine.job import Progress as JobProgress

PLAIN_EVERY = 60.0
"""Seconds between two lines without a terminal."""


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed, phase = task.finished_speed or task.speed, task.fields["phase"]
        return Text(rate(speed, task.fields["noun"]) if speed and phase == "working" else phase, "dim")


def rate(per_second: float, noun: str) -> str:
    """Return a rate as text: per second, or per minute if that is less than one."""
    return f"{per_second:.1f} {noun}/s" if per_second >= 1 else f"{60 * per_second:.2g} {noun}/min"


def duration(seconds: float) -> str:
    """Return a duration as text, in the largest unit of which there are two or more."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def follow_progress(console: Console, noun: str = "samples") -> Iterator[Callable[[JobProgress], None]]:
    """Yield a function to call with each new progress; it updates one bar, or prints a line per minute."""
    if not console.is_terminal:
        yield _plain(console, noun)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,} of {task.total:,} {task.fields[noun]}"),
        BarColumn(),
        _Speed(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("census", total=1, failed=0, noun=noun, phase="starting")

        def follow(progress: JobProgress) -> None:
            done, total = progress.done, _total(progress)
            phase = " ".join(filter(None, [progress.phase, progress.step]))
            bar.update(task, completed=done, total=total, failed=progress.failures, phase=phase)

        yield follow


def _total(progress: JobProgress) -> int:
    # Samples with the same id count once in the total, but each time when they are done.
    return max(progress.total, progress.done)


def _plain(console: Console, noun: str) -> Callable[[JobProgress], None]:
    began = last = time.monotonic()
    first: int | None = None

    def follow(progress: JobProgress) -> None:
        nonlocal last, first, began
        if progress.phase == "merging":
            # The last unit's line has all counts.
            if progress.step and time.monotonic() - last >= PLAIN_EVERY:
                last = time.monotonic()
                console.print(f"merging {progress.step}")
            return
        # A count that falls is the next pass over the data, whose speed is measured anew. The first count may include
        # what earlier calls have done, which says nothing about the speed either.
        if first is None or progress.done < first:
            first, began = progress.done, time.monotonic()
        now = time.monotonic()
        total = _total(progress)
        if now - last >= PLAIN_EVERY or progress.done == total:
            last = now
            speed = (progress.done - first) / max(now - began, 1e-9)
            parts = [f"{progress.done:,} of {total:,} {noun}", f"{progress.failures} failed"]
            if speed:
                parts.insert(1, rate(speed, noun))
            if speed and progress.done < total:
                parts.append(f"{duration((total - progress.done) / speed)} left")
            console.print(", ".join(parts))

    return follow
