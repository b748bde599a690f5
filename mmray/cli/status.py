"""The command `mmray status`: progress of a run and its analyses, with --watch, --sweep and --verify."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from mmray.errors import DamagedError
from mmray.terminal.options import INCOMPLETE, AsJson, RunArgument, app, command_line, console, plural, say, say_next

if TYPE_CHECKING:
    from mmray.runs.folder import RunFolder
    from mmray.runs.run import Status
    from mmray.runs.status import AnalysisStatus
    from mmray.runs.verification import Problem, VerificationResult

DAMAGED = 3
"""Exit status of --verify if it finds damage."""
FIRST = 10
"""Number of failed samples in --json; all of them are in the table `errors`."""
WATCH_EVERY = 3.0
"""Seconds between two updates of --watch."""
READING_SHARE = 0.2
"""Largest fraction of the time that --watch spends reading, because a large run takes long to read."""


@app.command(group="Read", examples=("mmray status runs/llava --watch", "mmray status s3://bucket/runs/llava --verify"))
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
    """Show how far each analysis of a run is, and what failed or is out of date."""
    from mmray.runs.sweep import sweep_run
    from mmray.runs.verification import verify_run

    folder = _folder(run)
    # Before anything is counted or verified, because it changes what is there.
    swept = sweep_run(folder) if sweep else None
    if swept and not as_json:
        young = f"; {swept.young} younger than an hour left" if swept.young else ""
        say(f"swept {swept.objects} objects, {swept.bytes / 1e6:.1f} MB{young}")
        for reason in swept.left:
            say(f"not swept: {reason}", "yellow")
    if watch:
        _watch(folder, as_json=as_json)
        return
    verified = verify_run(folder) if verify else None
    problems = [_with_remedy(problem, folder) for problem in verified.problems] if verified else []
    try:
        current = _read_status(folder)
    except DamagedError:
        if not problems:
            raise
        # The damage that prevents counting is among the problems.
        current = None
    if as_json:
        more = {"swept": asdict(swept)} if swept else {}
        more |= {"verified": {**asdict(verified), "problems": problems}} if verified else {}
        print(json.dumps((current.summary() if current else {}) | more))
    else:
        if current:
            # Paths and commands must not be wrapped.
            console.print(current.view(), soft_wrap=True)
            if current.census and current.census.finished and not verified:
                say_next(command_line("rank", run), command_line("properties", run))
        if verified:
            _say_verified(verified, problems)
    if problems:
        raise typer.Exit(DAMAGED)
    if swept and swept.left:
        raise typer.Exit(INCOMPLETE)


def _say_verified(verified: VerificationResult, problems: Sequence[Mapping[str, str]]) -> None:
    read = f"{verified.files:,} files, {verified.bytes / 1e6:,.1f} MB"
    wrong = plural(len(problems), "file") + f" damaged or missing; {read} as they were written"
    say(f"\nverified: {wrong if problems else f'{read}, all as they were written'}")
    for problem in problems:
        say(f"{problem['path']}: {problem['why']}; {problem['redo']}", "red")
    for path in verified.foreign:
        say(f"{path}: not written by mmray; it changes nothing, and may be removed", "yellow")


def _with_remedy(problem: Problem, folder: RunFolder) -> dict[str, str]:
    """Return a problem with the steps that make its file again."""
    steps = [f"remove {problem.remove}"] if problem.remove else []
    steps += [f"run: {_command(problem.command, folder, problem.settings)}"] if problem.command else []
    return {"path": problem.path, "why": problem.why, "redo": ", then ".join(steps)}


def _command(template: str, folder: RunFolder, settings: Mapping[str, Any]) -> str:
    """Return the command line that wrote something in a folder, which may have been moved since."""
    from mmray.cli.job import command_line
    from mmray.runs.analyses import is_run

    uri = folder.store.uri
    return command_line(template, {"run" if is_run(folder) else "edit": uri, "out": uri}, settings)


def _folder(uri: str) -> RunFolder:
    """Return the folder of a run, of an edit, or OUT of a job; raises InputError if nothing has begun there."""
    from mmray.runs.analyses import find_analyses, is_run
    from mmray.runs.folder import RunFolder
    from mmray.runs.run import open_run

    folder = RunFolder.at(uri)
    return folder if not is_run(folder) and find_analyses(folder.store) else open_run(uri).folder


@dataclass(frozen=True)
class _FolderStatus:
    """Status of a folder at one moment."""

    uri: str
    census: Status | None
    """None for a folder without a census, such as an edit's."""
    failures: list[dict[str, Any]]
    analyses: list[AnalysisStatus]

    @property
    def finished(self) -> bool:
        """Whether nothing is running or left to do."""
        if any(one.at_work or (one.pending and not one.at_rest) for one in self.analyses):
            return False
        census = self.census
        return census is None or (
            census.finished and not census.pending and (census.driver is None or census.driver.state != "at work")
        )

    def summary(self) -> dict[str, Any]:
        """Return the output of --json."""
        from mmray.runs.failures import reasons

        analyses = {"analyses": [one.summary() for one in self.analyses]}
        if self.census is None:
            return analyses
        more = {"pending": self.census.pending, "samples_per_second": self.census.samples_per_second}
        failed = {
            "reasons": [asdict(reason) for reason in reasons(self.failures)],
            "first_failures": self.failures[:FIRST],
        }
        return asdict(self.census) | more | failed | analyses

    def view(self) -> RenderableType:
        """Return the output for a terminal."""
        from mmray.features.census.view import analyses, status

        first = Text(self.uri, "bold") if self.census is None else status(self.census, self.failures, self.uri)
        return Group(first, analyses(self.analyses)) if self.analyses else first

    def line(self) -> str:
        """Return the progress of everything in one line."""
        failed = sum(one.failures for one in self.analyses)
        quarantined = sum(len(one.quarantined) for one in self.analyses)
        counts = []
        if census := self.census:
            counts += [f"census {census.shards_done:,} of {census.shards:,} shards"]
            counts += [f"{census.samples_done:,} of {census.samples:,} samples"]
            failed += census.failures
            quarantined += len(census.quarantined)
        counts += [f"{one.title} {one.size_done:,} of {one.size:,} {one.noun}" for one in self.analyses if one.pending]
        return ", ".join([*counts, f"{failed:,} failed", f"{quarantined:,} quarantined"])


def _read_status(folder: RunFolder) -> _FolderStatus:
    from mmray.runs.analyses import is_run
    from mmray.runs.run import open_run
    from mmray.runs.status import analyses

    run = open_run(folder.store.uri) if is_run(folder) else None
    found = [replace(one, renew=_command(one.renew, folder, one.settings)) for one in analyses(folder, run)]
    if run is None:
        return _FolderStatus(folder.store.uri, None, [], found)
    return _FolderStatus(run.uri, run.status(), run.failures(), found)


def _watch(folder: RunFolder, *, as_json: bool) -> None:
    """Show the status repeatedly until everything is finished, or Ctrl-C."""
    try:
        if as_json:
            _follow(folder, lambda current: json.dumps(current.summary()), print)
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                _follow(folder, _FolderStatus.view, lambda view: live.update(view, refresh=True))
        else:
            _follow(folder, _FolderStatus.line, say)
    except KeyboardInterrupt:
        return


def _follow(folder: RunFolder, render: Callable[[_FolderStatus], Any], show: Callable[[Any], None]) -> None:
    last = None
    while True:
        began = time.monotonic()
        current = _read_status(folder)
        rendered = render(current)
        # A log that repeats itself every few seconds is of no use.
        if rendered != last:
            show(rendered)
            last = rendered
        if current.finished:
            return
        time.sleep(max(WATCH_EVERY, (time.monotonic() - began) / READING_SHARE))
