"""The commands census, plan, rank, neuron, diff and refresh."""

from __future__ import annotations

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
    command_line,
    console,
    option,
    plural,
    say,
    say_json,
    say_next,
    show_progress,
    warn,
    with_settings,
)

if TYPE_CHECKING:
    from mmray.features.census.drift import Drift
    from mmray.features.census.job import CensusResult

DRIFTED = 3
"""Exit status of a comparison whose drift is above --limit."""
LISTED = 20
"""Concepts and neurons that --json lists; drift.json in the run has all, and so has Python."""

Limit = Annotated[
    float | None,
    typer.Option(
        "--limit",
        help="Exit with status 3 if the drift is above this, 0 to 1; default: none. The drift is 1 − the mean "
        "rank-biased overlap of the rankings of concepts with new occurrences.",
        min=0,
        max=1,
    ),
]

Measure = Annotated[
    bool,
    typer.Option("--measure", help="Time the model on the first 128 samples."),
]
Price = Annotated[
    float | None,
    typer.Option("--price", metavar="X", help="Price per worker and hour; adds the total.", min=0),
]


@app.command(
    group="Run",
    examples=(
        "mmray census -m llava-hf/llava-1.5-7b-hf -d captions.parquet -o runs/llava",
        "mmray census -m demo -d demo -o runs/demo --limit 256 --local",
    ),
)
@with_settings(CensusSettings)
def census(as_json: AsJson = False, **settings: Any) -> None:
    """Score and rank every neuron on image-caption data; run it again to resume."""
    outcome = follow_census(census_settings(settings))
    if as_json:
        say_json(asdict(outcome))
    else:
        took = "already finished" if outcome.already else f"in {outcome.seconds:.0f} s"
        say(f"{plural(outcome.samples, 'sample')} {took} → {outcome.out}")
        _say_problems(outcome)
        if outcome.occurrences:
            say_next(command_line("rank", outcome.out), command_line("status", outcome.out))
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


@app.command(
    group="Run",
    examples=(
        "mmray plan -m llava-hf/llava-1.5-7b-hf -d annotations/captions_val2017.json",
        "mmray plan -m demo -d demo --measure --price 0.40",
    ),
)
@with_settings(CensusSettings, out="runs/plan")
def plan(measure: Measure = False, price: Price = None, as_json: AsJson = False, **settings: Any) -> None:
    """Estimate what a census would cost: samples, hours, memory, bytes."""
    # Imported here because it loads torch, which `mmray --help` and reading commands don't need.
    from mmray.features.census.planning import plan_census
    from mmray.features.census.view import plan as show

    estimate = plan_census(census_settings(settings), measure=measure)
    if as_json:
        hours = {"hours": estimate.hours, "worker_hours": estimate.worker_hours}
        cost = {} if price is None else {"price": price * estimate.worker_hours}
        say_json(asdict(estimate) | hours | cost | {"warnings": estimate.sample.warnings})
    else:
        console.print(show(estimate, price))
        say_next(command_line("census", *_given(settings), "--out", "RUN"))


def _given(settings: dict[str, Any]) -> list[str]:
    """Return the options that differ from their defaults, as words of a command line."""
    words: list[str] = []
    for name, field in CensusSettings.model_fields.items():
        value = settings[name]
        if name != "out" and value not in (None, () if field.is_required() else field.default):
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, tuple | list) else (value,)
            # A flag takes no value, and a repeatable option is given once per value.
            words += [flag] if value is True else [word for one in values for word in (flag, str(one))]
    return words


def follow_census(settings: CensusSettings) -> CensusResult:
    """Run a census, and show its progress."""
    from mmray.features.census.job import run_census

    stderr = Console(stderr=True, highlight=False)
    with show_progress(what=settings.out) as follow:
        return run_census(
            settings,
            follow,
            # Not as markup: file names and captions may have brackets.
            lambda line: stderr.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True),
        )


def _say_problems(outcome: CensusResult) -> None:
    say_shortfall(outcome)
    for number, reason in outcome.quarantined.items():
        say(f"shard {number} quarantined: {reason}", "red")


def say_shortfall(outcome: CensusResult) -> None:
    """Print how many samples of a census were skipped or failed, if any."""
    from mmray.features.census.view import skipped

    for line in skipped(outcome.skipped, outcome.analysed):
        say(f"{line}; see --nouns")
    if outcome.failures:
        say(f"{plural(outcome.failures, 'sample')} failed; see: mmray status {outcome.out}", "yellow")


@app.command(group="Read", examples=("mmray rank runs/llava", "mmray rank runs/llava dog --by specific --k 20"))
def rank(
    run: RunArgument,
    concept: Annotated[
        str | None, typer.Argument(help="A noun of the captions, such as dog; without it, list all concepts.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Neurons to show, default: 10; or concepts, default: all.", min=1)
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Order by score, specific, selective or share.")] = "score",
    as_json: AsJson = False,
) -> None:
    """Show a concept's neurons, highest first; without a concept, list all concepts.

    A rank marked ? is not certified: neurons that shards left out may change it, and more --candidates may settle it.

    Words after − belong to a neuron with negative activation there: they are those that its row of W_out suppresses.
    """
    from mmray.features.census.view import concept_list, concept_title, ranking
    from mmray.runs.run import open_run

    opened = open_run(run)
    # Without a concept, `k` counts concepts.
    if concept is None:
        listed = opened.concept_table(by).slice(0, k)
        if as_json:
            say_json(listed.to_pylist())
        else:
            console.print(concept_list(listed, len(opened.concepts)))
            if len(listed):
                say_next(command_line("rank", run, listed["concept"][0].as_py()))
        return
    rows = opened.rank(concept, k or 10, by)
    if as_json:
        say_json(rows.to_pylist())
    else:
        console.print(ranking(rows, concept_title(opened, rows), by))
        say_next(command_line("neuron", run, rows["neuron"][0].as_py()), command_line("properties", run))


@app.command(group="Read", examples=("mmray neuron runs/llava L29.u4021", "mmray neuron runs/llava L29.u4021 --json"))
def neuron(
    run: RunArgument,
    name: Annotated[str, typer.Argument(metavar="NEURON", help="Layer and unit, such as L7.u89.")],
    as_json: AsJson = False,
) -> None:
    """Show the words a neuron writes, its concepts, and its extreme examples.

    With negative activation it writes other words than with positive. Concepts that use it that way are marked −.
    """
    from mmray.features.census.view import neuron as show
    from mmray.runs.run import open_run

    facts = open_run(run).neuron(name)
    if as_json:
        say_json(facts)
    else:
        console.print(show(facts))
        say_next(command_line("serve", run, "--model", "run"))


@app.command(
    group="Read",
    examples=("mmray diff runs/before runs/after", "mmray diff runs/before runs/after --by specific --limit 0.3"),
)
def diff(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="A run: a local path or s3://bucket/prefix.")],
    after: Annotated[str, typer.Argument(metavar="RUN_B", help="The run to compare with it.")],
    k: Annotated[int, typer.Option("--k", help="Neurons per concept to compare.", min=1)] = 50,
    by: Annotated[str, typer.Option("--by", help="Order by score or specific.")] = "score",
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Show how far the rankings of two runs have drifted apart."""
    from mmray.features.census.drift import compare
    from mmray.runs.run import open_run

    drift = compare(open_run(before), open_run(after), k, by)
    if as_json:
        say_json(drift.summary(LISTED))
    else:
        _show(drift)
        say_next(command_line("rank", after))
    _check_limit(limit, drift)


@app.command(group="Run", examples=("mmray refresh runs/llava", "mmray refresh runs/llava --limit 0.3"))
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
    """Analyse data added since the run, merge it, and show the drift."""
    from mmray.features.census.refresh import refresh_run

    execution: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "local": local,
        "address": address,
        "retry_failed": retry_failed,
    }
    with show_progress(what=run) as follow:
        done = refresh_run(run, follow, **execution)
    if as_json:
        drift = done.drift and done.drift.summary(LISTED)
        say_json(asdict(done.outcome) | {"new_samples": done.new_samples, "drift": drift})
    else:
        say(f"{plural(done.new_samples, 'new sample')} in {done.outcome.seconds:.0f} s → {run}")
        _say_problems(done.outcome)
        if done.drift:
            _show(done.drift)
        if done.new_samples:
            say_next(command_line("rank", run), command_line("status", run))
    if done.drift:
        _check_limit(limit, done.drift)
    if not done.outcome.complete:
        raise typer.Exit(INCOMPLETE)


def _show(drift: Drift) -> None:
    from mmray.features.census.view import drift as show

    console.print(show(drift))


def _check_limit(limit: float | None, drift: Drift) -> None:
    """Exit with DRIFTED if the drift is above the limit."""
    if limit is not None and drift.drift > limit:
        warn(f"drift {drift.drift:.3f} is above the limit of {limit:g}")
        raise typer.Exit(DRIFTED)
