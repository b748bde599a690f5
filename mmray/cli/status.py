"""How far a run and its analyses are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from mmray.cli.options import INCOMPLETE, AsJson, RunArgument, app, console, plural, say
from mmray.errors import DamagedError

if TYPE_CHECKING:
    from mmray.results.run import Status
    from mmray.results.status import AnalysisStatus
    from mmray.runs.verification import Problem, Verified

DAMAGED = 3
"""Exit status of --verify where a file is not what was written."""
FIRST = 10
"""Failed samples that --json gives; all are in the run's table `errors`."""
REFRESHED, LOOKING = 3.0, 0.2
"""Seconds between two looks of --watch, and the part of the time they take at most: a large run is long to read."""


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Follow until all is done, or Ctrl-C; where there is no terminal, print a line per change.",
        ),
    ] = False,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="First remove what killed and late workers left: parts that no receipt names, half-written files, "
            "notes on attempts at what is committed. What a worker might still commit is left for an hour; a job "
            "that is driven is left alone (exit status 4).",
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every committed part, snapshot and table file; name each that is damaged or missing, with the "
            "command that redoes it (exit status 3), and files that mmray did not write.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a run and each of its analyses is: done, pending, quarantined, and why; what failed; what took the
    time; who drives it; and which tables are older than what they are made from, with the command that renews them.
    """
    from mmray.results.run import open_run
    from mmray.runs.sweep import sweep_run
    from mmray.runs.verification import verify_run

    swept = sweep_run(open_run(run).folder) if sweep else None
    if swept and not as_json:
        young = f"; {swept.young} younger than an hour left" if swept.young else ""
        say(f"swept {swept.objects} objects, {swept.bytes / 1e6:.1f} MB{young}")
        for reason in swept.left:
            say(f"not swept: {reason}", "yellow")
    if watch:
        _watch(run, as_json=as_json)
        return
    verified = verify_run(open_run(run).folder) if verify else None
    problems = [_told(problem, run) for problem in verified.problems] if verified else []
    try:
        seen = _look(run)
    except DamagedError:
        if not problems:
            raise
        # What can't be counted is among the problems.
        seen = None
    if as_json:
        more = {"swept": asdict(swept)} if swept else {}
        more |= {"verified": {**asdict(verified), "problems": problems}} if verified else {}
        print(json.dumps((seen.summary() if seen else {}) | more))
    else:
        if seen:
            # Lines with paths and commands stay whole at any width.
            console.print(seen.view(), soft_wrap=True)
        if verified:
            _say_verified(verified, problems)
    if problems:
        raise typer.Exit(DAMAGED)
    if swept and swept.left:
        raise typer.Exit(INCOMPLETE)


def _say_verified(verified: Verified, problems: Sequence[Mapping[str, str]]) -> None:
    read = f"{verified.files:,} files, {verified.bytes / 1e6:,.1f} MB"
    wrong = plural(len(problems), "file") + f" damaged or missing; {read} as they were written"
    say(f"\nverified: {wrong if problems else f'{read}, all as they were written'}")
    for problem in problems:
        say(f"{problem['path']}: {problem['why']}; {problem['redo']}", "red")
    for path in verified.foreign:
        say(f"{path}: not written by mmray; it changes nothing, and may be removed", "yellow")


def _told(problem: Problem, uri: str) -> dict[str, str]:
    """Return a problem with what redoes the file."""
    steps = [f"remove {problem.remove}"] if problem.remove else []
    steps += [f"run: {_command(problem.command, uri, problem.settings)}"] if problem.command else []
    return {"path": problem.path, "why": problem.why, "redo": ", then ".join(steps)}


def _command(template: str, uri: str, settings: Mapping[str, Any]) -> str:
    """Return the call that has made something of a run."""
    from mmray.cli.job import command_line

    return command_line(template, {"run": uri, "out": uri}, settings)


@dataclass(frozen=True)
class _Seen:
    """A run at one moment."""

    uri: str
    census: Status
    failures: list[dict[str, Any]]
    analyses: list[AnalysisStatus]

    @property
    def over(self) -> bool:
        """Whether nothing is at work or left to do."""
        census = self.census
        at_work = census.driver is not None and census.driver.state == "at work"
        left = [one for one in self.analyses if one.at_work or (one.pending and not one.at_rest)]
        return census.finished and not (census.pending or at_work or left)

    def summary(self) -> dict[str, Any]:
        """Return what --json says."""
        from mmray.results.run import reasons

        more = {"pending": self.census.pending, "samples_per_second": self.census.samples_per_second}
        return (
            asdict(self.census)
            | more
            | {
                "reasons": [asdict(reason) for reason in reasons(self.failures)],
                "first_failures": self.failures[:FIRST],
                "analyses": [one.summary() for one in self.analyses],
            }
        )

    def view(self) -> RenderableType:
        """Return what the terminal shows."""
        from mmray.results.terminal import analyses, status

        census = status(self.census, self.failures, self.uri)
        return Group(census, analyses(self.analyses)) if self.analyses else census

    def line(self) -> str:
        """Return how far everything is, in one line."""
        census = self.census
        counts = [
            f"census {census.shards_done:,} of {census.shards:,} shards",
            f"{census.samples_done:,} of {census.samples:,} samples",
        ]
        counts += [f"{one.title} {one.size_done:,} of {one.size:,} {one.noun}" for one in self.analyses if one.pending]
        failed = census.failures + sum(one.failures for one in self.analyses)
        aside = len(census.quarantined) + sum(len(one.quarantined) for one in self.analyses)
        return ", ".join([*counts, f"{failed:,} failed", f"{aside:,} quarantined"])


def _look(uri: str) -> _Seen:
    from mmray.results.run import open_run
    from mmray.results.status import analyses

    run = open_run(uri)
    found = [replace(one, renew=_command(one.renew, run.uri, one.settings)) for one in analyses(run)]
    return _Seen(run.uri, run.status(), run.failures(), found)


def _watch(uri: str, *, as_json: bool) -> None:
    """Look again and again until all is done, or the user has seen enough."""
    try:
        if as_json:
            _follow(uri, lambda seen: json.dumps(seen.summary()), print)
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                _follow(uri, _Seen.view, lambda view: live.update(view, refresh=True))
        else:
            _follow(uri, _Seen.line, say)
    except KeyboardInterrupt:
        return


def _follow(uri: str, shown: Callable[[_Seen], Any], show: Callable[[Any], None]) -> None:
    last = None
    while True:
        began = time.monotonic()
        seen = _look(uri)
        now = shown(seen)
        if now != last:
            show(now)
            last = now
        if seen.over:
            return
        time.sleep(max(REFRESHED, (time.monotonic() - began) / LOOKING))
