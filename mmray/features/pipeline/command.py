"""The command `pipeline`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mmray.features import FEATURES
from mmray.terminal.config import read_config
from mmray.terminal.options import INCOMPLETE, AsJson, app, command_line, console, resumable, say, say_json, say_next

if TYPE_CHECKING:
    from mmray.features.pipeline.job import Follow, Pipeline, PipelineSettings


@app.command(
    group="Run",
    examples=(
        "mmray pipeline jobs/configs/pipeline.yaml",
        "mmray pipeline jobs/configs/pipeline.yaml census.limit=64 --local",
    ),
)
def pipeline(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML file with `census`, `steps`, `edits`, `evaluation`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE …]", help="Change settings of the file: census.limit=64.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run every step in this process, without Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a census, further analyses, edits and evaluations; run it again to resume."""
    from mmray.features.evaluation.view import comparison
    from mmray.features.pipeline.job import pipeline_settings

    values = read_config(file, overrides or [])
    done = follow_pipeline(pipeline_settings(values | {"local": True} if local else values))
    if as_json:
        steps = {title: asdict(step) for title, step in done.steps.items()}
        answer = {"run": done.run.uri, "steps": steps, "evaluations": done.measures, "quarantined": done.quarantined}
        say_json(answer)
    else:
        if done.evaluations:
            console.print(comparison(done.measures))
        for title, step in done.steps.items():
            say(f"{title}: {step.seconds:.0f} s")
            for number, reason in step.quarantined.items():
                say(f"{title}, unit {number} quarantined: {reason}", "red")
        say(f"{done.census.samples:,} samples, {len(done.edits):,} edits → {done.run.uri}")
        for name, reason in done.quarantined.items():
            say(f"edit {name} quarantined: {reason}", "red")
        say_next(command_line("report", done.run.uri))
    if not done.complete:
        raise typer.Exit(INCOMPLETE)


def follow_pipeline(settings: PipelineSettings) -> Pipeline:
    """Run a pipeline, and show the progress of each step."""
    from mmray.features.pipeline.job import run_pipeline

    with resumable(), ExitStack() as bars:
        return run_pipeline(settings, _follow(bars))


def _follow(bars: ExitStack) -> Follow:
    """Return a function that shows progress as one bar at a time, for a step or for steps that run side by side."""
    from mmray.terminal.progress import follow_progress

    shown: dict[str, Any] = {}

    def follow(step: str, progress: Any) -> None:
        if step not in shown:
            # Steps follow each other, so the last bar is complete.
            bars.close()
            # A title may list several steps, or have a number; its first word names the feature.
            feature = FEATURES.get(step.split()[0])
            noun = {"edits": "edits", "evaluations": "samples"}.get(step, feature.noun if feature else "items")
            shown[step] = bars.enter_context(follow_progress(Console(stderr=True), noun))
        shown[step](progress)

    return follow
