"""The main job: census, what it would cost, and the demo."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mmray.cli.showing import say_edits, say_meaning, say_report, say_shortfall
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.terminal.options import INCOMPLETE, AsJson, app, console, followed, plural, say, with_settings

if TYPE_CHECKING:
    from mmray.features.census.job import Outcome

FULL, QUICK = (12, 2), (3, 1)
"""Of the demo, concepts whose properties are measured, and images of each concept with heat maps."""


@app.command()
@with_settings(CensusSettings)
def census(as_json: AsJson = False, **settings: Any) -> None:
    """Capture, score, reduce and rank every neuron on image-caption data. Run it again to resume."""
    outcome = _run_census(census_settings(settings))
    if as_json:
        print(json.dumps(asdict(outcome)))
    else:
        _say_outcome(outcome)
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


@app.command()
@with_settings(CensusSettings, out="runs/plan")
def plan(as_json: AsJson = False, **settings: Any) -> None:
    """Say what a census would cost: samples, shards, hours, bytes. Nothing is run."""
    from mmray.features.census.job import plan_census
    from mmray.features.census.view import plan as show

    estimate = plan_census(census_settings(settings))
    if as_json:
        print(json.dumps(asdict(estimate) | {"hours": estimate.hours, "warnings": estimate.sample.warnings}))
    else:
        console.print(show(estimate))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("mmray-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="The first 256 scenes instead of all 1,536.")] = False,
) -> None:
    """Run the whole main job on the embedded model and data: no network, no GPU."""
    from mmray.engine.session import ray_session

    console.file = sys.stdout  # while there is a Ray, what else is printed goes to stderr
    try:
        with ray_session(None):  # one for all the steps
            complete = _run_demo(out / ("quick" if quick else "full"), quick=quick)
    finally:
        console.file = None  # type: ignore[assignment]  # whatever sys.stdout is, as before
    if not complete:
        raise typer.Exit(INCOMPLETE)


def _run_demo(run_folder: Path, *, quick: bool) -> bool:
    """Run the demo's steps, and say what each found; True where all went well."""
    from mmray.features.census.view import summary
    from mmray.runs.run import open_run

    say(f"1 census of the demo's scenes on a local Ray → {run_folder}", "bold")
    settings = census_settings(
        {
            "model": "demo",
            "data": "demo",
            "out": str(run_folder),
            "limit": 256 if quick else None,
            "shard_size": 128 if quick else 256,
        }
    )
    outcome = _run_census(settings)
    run = open_run(run_folder)
    console.print(
        f"  {outcome.samples:,} scenes, {len(run.concepts)} concepts, {sum(run.concepts.values()):,} occurrences, "
        f"{sum(run.info['model']['widths']):,} neurons each, {outcome.seconds:.0f} s"
    )
    say_shortfall(outcome)
    say("2 rankings: which neurons write a noun, and what else they write\n", "bold")
    console.print(summary(run, list(run.concepts)[:3]))
    complete = say_meaning(run_folder, *(QUICK if quick else FULL))
    complete &= say_edits(settings, quick=quick)
    say_report(run_folder)
    concept = next(iter(run.concepts))
    first = run.rank(concept, 1)["neuron"][0].as_py()
    say(f"next: mmray rank {run_folder} {concept} · mmray neuron {run_folder} {first}")
    return outcome.complete and complete


def _run_census(settings: CensusSettings) -> Outcome:
    from mmray.features.census.job import run_census

    stderr = Console(stderr=True, highlight=False)
    with followed(what=settings.out) as follow:
        return run_census(
            settings,
            follow,
            lambda line: stderr.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True),
        )


def _say_outcome(outcome: Outcome) -> None:
    took = "already finished" if outcome.already else f"in {outcome.seconds:.0f} s"
    say(f"{plural(outcome.samples, 'sample')} {took} → {outcome.out}")
    say_shortfall(outcome)
    for number, reason in outcome.quarantined.items():
        say(f"shard {number} quarantined: {reason}", "red")
    if outcome.occurrences:
        say(f"next: mmray rank {outcome.out}")
