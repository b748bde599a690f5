"""The commands of a census: census, plan, rank, neuron, diff, refresh."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mmray.features.census.settings import CensusSettings, census_settings
from mmray.terminal.options import (
    INCOMPLETE,
    AsJson,
    RunArgument,
    app,
    console,
    followed,
    option,
    plural,
    say,
    with_settings,
)

if TYPE_CHECKING:
    from mmray.features.census.drift import Drift
    from mmray.features.census.job import CensusResult


@app.command()
@with_settings(CensusSettings)
def census(as_json: AsJson = False, **settings: Any) -> None:
    """Capture, score, reduce and rank every neuron on image-caption data. Run it again to resume."""
    outcome = follow_census(census_settings(settings))
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


def follow_census(settings: CensusSettings) -> CensusResult:
    """Run a census, and show how far it is."""
    from mmray.features.census.job import run_census

    stderr = Console(stderr=True, highlight=False)
    with followed(what=settings.out) as follow:
        return run_census(
            settings,
            follow,
            lambda line: stderr.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True),
        )


def _say_outcome(outcome: CensusResult) -> None:
    took = "already finished" if outcome.already else f"in {outcome.seconds:.0f} s"
    say(f"{plural(outcome.samples, 'sample')} {took} → {outcome.out}")
    say_shortfall(outcome)
    for number, reason in outcome.quarantined.items():
        say(f"shard {number} quarantined: {reason}", "red")
    if outcome.occurrences:
        say(f"next: mmray rank {outcome.out}")


def say_shortfall(outcome: CensusResult) -> None:
    """Say how many samples of a census were skipped or failed, where any were."""
    from mmray.features.census.view import skipped

    for line in skipped(outcome.skipped, outcome.analysed):
        say(f"{line}; see --nouns")
    if outcome.failures:
        say(f"{plural(outcome.failures, 'sample')} failed; see: mmray status {outcome.out}", "yellow")


@app.command()
def rank(
    run: RunArgument,
    concept: Annotated[
        str | None, typer.Argument(help="A noun of the captions, such as dog; without it, all concepts are listed.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Neurons to show, by default 10; or concepts, by default all.", min=1)
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Order by score, specific, selective or share.")] = "score",
    as_json: AsJson = False,
) -> None:
    """Show a concept's neurons, highest first, or without a concept those there are, each with its highest neuron.

    A rank marked ? is not certified in the order shown: what shards left out may change it, and more --candidates may
    settle it. There are no certificates by share.

    A neuron adds activation × its row of W_out. Words behind − are of one whose activation is negative there: those
    that its row suppresses.
    """
    from mmray.features.census.view import concept_list, concept_title, ranking
    from mmray.runs.run import open_run

    opened = open_run(run)
    if concept is None:
        listed = opened.concept_table(by).slice(0, k)
        if as_json:
            print(json.dumps(listed.to_pylist(), ensure_ascii=False))
        else:
            console.print(concept_list(listed, len(opened.concepts)))
        return
    rows = opened.rank(concept, k or 10, by)
    if as_json:
        print(json.dumps(rows.to_pylist(), ensure_ascii=False))
    else:
        console.print(ranking(rows, concept_title(opened, concept), by))


@app.command()
def neuron(
    run: RunArgument,
    name: Annotated[str, typer.Argument(metavar="NEURON", help="Layer and unit, such as L7.u89.")],
    as_json: AsJson = False,
) -> None:
    """Show what a neuron writes, which concepts use it, and its highest and lowest examples.

    It writes other words by negative activation than by positive; concepts that use it so are marked −.
    """
    from mmray.features.census.view import neuron as show
    from mmray.runs.run import open_run

    facts = open_run(run).neuron(name)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        console.print(show(facts))


DRIFTED = 3
"""Exit status of a comparison whose drift is above the limit."""


LISTED = 20
"""Concepts and neurons that --json gives; all are in the run's drift.json or to be had from Python."""


Limit = Annotated[
    float | None,
    typer.Option(
        "--limit",
        help="Exit status 3 above this drift: 1 − the mean rank-biased overlap of the rankings of concepts with new "
        "occurrences, each counted once, 0 to 1; by default none.",
        min=0,
        max=1,
    ),
]


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="A run: a local path or s3://bucket/prefix.")],
    after: Annotated[str, typer.Argument(metavar="RUN_B", help="The run to compare with it.")],
    k: Annotated[int, typer.Option("--k", help="Neurons a concept that are compared.", min=1)] = 50,
    by: Annotated[str, typer.Option("--by", help="Order by score or specific.")] = "score",
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Say how far the rankings of two runs have drifted apart, and which neurons' activity has shifted."""
    from mmray.features.census.drift import compare
    from mmray.runs.run import open_run

    drift = compare(open_run(before), open_run(after), k, by)
    if as_json:
        print(json.dumps(drift.summary(LISTED), ensure_ascii=False))
    else:
        _show(drift)
    _hold_to(limit, drift)


@app.command()
def refresh(
    run: RunArgument,
    limit: Limit = None,
    batch_size: Annotated[int | None, option("batch_size", CensusSettings)] = None,
    workers: Annotated[str | None, option("workers", CensusSettings)] = None,
    gpus_per_worker: Annotated[float | None, option("gpus_per_worker", CensusSettings)] = None,
    address: Annotated[str | None, option("address", CensusSettings)] = None,
    retry_failed: Annotated[bool, option("retry_failed", CensusSettings)] = False,
    local: Annotated[bool, option("local", CensusSettings)] = False,
    as_json: AsJson = False,
) -> None:
    """Analyse what a run's data has gained since, merge it, and say how far the rankings have drifted."""
    from mmray.features.census.refresh import refresh_run

    execution: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "local": local,
        "address": address,
        "retry_failed": retry_failed or None,
    }
    with followed(what=run) as follow:
        done = refresh_run(run, follow, **execution)
    if as_json:
        drift = done.drift and done.drift.summary(LISTED)
        print(json.dumps(asdict(done.outcome) | {"new_samples": done.new_samples, "drift": drift}, ensure_ascii=False))
    else:
        say(f"{plural(done.new_samples, 'new sample')} in {done.outcome.seconds:.0f} s → {run}")
        say_shortfall(done.outcome)
        for number, reason in done.outcome.quarantined.items():
            say(f"shard {number} quarantined: {reason}", "red")
        if done.drift:
            _show(done.drift)
    if done.drift:
        _hold_to(limit, done.drift)
    if not done.outcome.complete:
        raise typer.Exit(INCOMPLETE)


def _show(drift: Drift) -> None:
    from mmray.features.census.view import drift as show

    console.print(show(drift))


def _hold_to(limit: float | None, drift: Drift) -> None:
    if limit is not None and drift.drift > limit:
        print(f"mmray: drift {drift.drift:.3f} is above the limit of {limit:g}", file=sys.stderr)
        raise typer.Exit(DRIFTED)
