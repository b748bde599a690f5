"""One bar that follows what is committed; one plain line a minute where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY = 60.0
"""Seconds between two lines where there is no terminal."""


class Counts(Protocol):
    """How far the work is: samples done of total, and samples that failed."""

    @property
    def done(self) -> int:
        """Samples committed or quarantined."""

    @property
    def total(self) -> int:
        """Samples of the run."""

    @property
    def failures(self) -> int:
        """Samples that failed."""


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {task.fields['things']}/s" if speed else "starting", "dim")


@contextmanager
def follow_progress(console: Console, things: str = "samples") -> Iterator[Callable[[Counts], None]]:
    """Yield a function to call with each new count of `things`: it keeps one bar, or writes a line a minute."""
    if not console.is_terminal:
        yield _plain(console, things)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,} of {task.total:,} {task.fields[things]}"),
        BarColumn(),
        _Speed(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("census", total=1, failed=0, things=things)

        def follow(counts: Counts) -> None:
            bar.update(task, completed=counts.done, total=_total(counts), failed=counts.failures)

        yield follow


def _total(counts: Counts) -> int:
    # Samples of one id are one of the total, but each is counted where it is done.
    return max(counts.total, counts.done)


def _plain(console: Console, things: str) -> Callable[[Counts], None]:
    began = last = time.monotonic()
    first: int | None = None

    def follow(counts: Counts) -> None:
        nonlocal last, first, began
        # Work of several passes is told from its beginning at each.
        if first is None or counts.done < first:
            first, began = counts.done, time.monotonic()
        now = time.monotonic()
        total = _total(counts)
        if now - last >= PLAIN_EVERY or counts.done == total:
            last = now
            speed = (counts.done - first) / max(now - began, 1e-9)
            left = f", {(total - counts.done) / speed:.0f} s left" if speed else ""
            done = f"{counts.done:,} of {total:,} {things}"
            console.print(f"{done}, {speed:.1f} {things}/s, {counts.failures} failed{left}")

    return follow
