"""What an edit did: its evaluation."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from mmray.cli.options import INCOMPLETE, AsJson, RunArgument, app, console, say
from mmray.evaluation.settings import EvaluationSettings, evaluation_settings


def _with_settings(command: Any) -> Any:
    """Give the command every setting of an evaluation but the run as an option, handed on as a keyword."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=RunArgument)]
    for name, field in EvaluationSettings.model_fields.items():
        if name != "run":
            default = inspect.Parameter.empty if field.is_required() else field.default
            flag = f"--{name.replace('_', '-')}"
            # None is a third state, which needs both names.
            names = f"{flag}/--no-{name}" if field.annotation == (bool | None) else flag
            option = typer.Option(names, help=" ".join((field.description or "").split()))
            parameters.append(
                inspect.Parameter(name, keyword, default=default, annotation=Annotated[field.annotation, option])
            )
    parameters += [
        value.replace(kind=keyword)
        for value in inspect.signature(command, eval_str=True).parameters.values()
        if value.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    # typer reads the types from the one and the rest from the other.
    command.__annotations__ = {value.name: value.annotation for value in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


@app.command()
@_with_settings
def evaluate(
    everything: Annotated[bool, typer.Option("--all", help="Show every protocol, and its words in full.")] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measure an edit before and after: success, generality, locality, hallucination, caption quality, and its cost."""
    from mmray.cluster.evaluation import run_evaluation
    from mmray.results.evaluation import measures
    from mmray.results.progress import follow_progress

    checked = evaluation_settings(settings)
    try:
        with follow_progress(Console(stderr=True)) as follow:
            outcome = run_evaluation(checked, follow)
    except KeyboardInterrupt:
        print("mmray: stopped; the same command goes on where it was", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps({"measures": outcome.measures, "cost": outcome.facts}, ensure_ascii=False, default=str))
    else:
        console.print(measures(outcome.measures, f"{checked.edit} on {checked.data}", everything=everything))
        cost = " · ".join(
            f"{name} {value}" for name, value in outcome.facts.items() if not isinstance(value, dict | list)
        )
        say(f"cost: {cost}" if cost else "", "dim")
        say(f"{outcome.samples:,} samples and questions in {outcome.seconds:.0f} s → {checked.edit}/evaluation.json")
        if outcome.failures:
            say(f"{outcome.failures:,} of them failed", "yellow")
        for number, reason in outcome.shards_aside.items():
            say(f"unit {number} set aside: {reason}", "red")
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)
