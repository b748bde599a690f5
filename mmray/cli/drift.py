"""Runs compared with each other, and with themselves as their data grows."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmray.cli.showing import say_shortfall
from mmray.features.census.settings import CensusSettings
from mmray.terminal.options import INCOMPLETE, AsJson, RunArgument, app, console, followed, option, plural, say

if TYPE_CHECKING:
    from mmray.features.census.drift import Drift

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
