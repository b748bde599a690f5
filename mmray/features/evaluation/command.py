"""The command `mmray evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mmray.features.evaluation.settings import EvaluationSettings, evaluation_settings
from mmray.terminal.options import (
    AsJson,
    RunArgument,
    app,
    command_line,
    console,
    finish,
    run_with_progress,
    say,
    say_json,
    say_next,
    with_settings,
)


@app.command(
    group="Edit",
    examples=(
        "mmray evaluate runs/llava --edit edits/dog-cat --data held-out.parquet",
        "mmray evaluate runs/llava --edit edits/dog-cat --data demo --limit 64",
        "mmray evaluate runs/llava --decoding vcd --data held-out.parquet",
    ),
)
@with_settings(EvaluationSettings)
def evaluate(
    run: RunArgument,
    everything: Annotated[bool, typer.Option("--all", help="Show every protocol, in full.")] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measure an edit or a decoding: success, generality, locality, and more."""
    from mmray.features.evaluation.job import EvaluationJob
    from mmray.features.evaluation.view import measures

    checked = evaluation_settings({"run": run, **settings})
    done = run_with_progress(EvaluationJob(checked))
    if as_json:
        say_json(done.summary())
    else:
        found = done.headline
        subject = checked.edit or checked.decoding
        console.print(measures(found["measures"], f"{subject} on {checked.data}", everything=everything))
        if found["verdict"] is not None:
            say(f"verdict: {found['verdict']['words']}", "bold")
        cost = " · ".join(
            f"{name} {value}" for name, value in found["cost"].items() if not isinstance(value, dict | list)
        )
        say(f"cost: {cost}" if cost else "", "dim")
        say(f"{done.done:,} samples and questions in {done.seconds:.0f} s → {checked.subject}/evaluation.json")
        if checked.edit is not None:
            say_next(command_line("report", run, "--edit", checked.edit), command_line("push", run, "ORG/NAME"))
    finish(done, "sample", quiet=as_json)
