"""The command `selectivity`."""

from __future__ import annotations

from typing import Any

import typer

from mmray.features.selectivity.settings import SelectivitySettings, selectivity_settings
from mmray.terminal.options import (
    INCOMPLETE,
    AsJson,
    RunArgument,
    app,
    command_line,
    console,
    say,
    say_json,
    say_next,
    show_progress,
    warn,
    with_settings,
)


@app.command(
    group="Understand",
    examples=(
        "mmray selectivity runs/llava --by language",
        "mmray selectivity runs/llava --by domain --method contribution --interventions",
    ),
)
@with_settings(SelectivitySettings)
def selectivity(run: RunArgument, as_json: AsJson = False, **settings: Any) -> None:
    """Choose the neurons of each language, domain or other label, and test them."""
    from mmray.features.selectivity.driver import run_selectivity
    from mmray.features.selectivity.view import analysis

    checked = selectivity_settings({"run": run, **settings})
    with show_progress() as follow:
        outcome = run_selectivity(checked, follow)
    if outcome.outdated:
        names = ", ".join(outcome.outdated)
        warn(f"{names}: removed, because other neurons are chosen now; run these tests again")
    if as_json:
        found = {name: rows.to_pylist() for name, rows in outcome.tables.items()}
        say_json(found, allow_nan=False)
    else:
        console.print(analysis(outcome.tables))
        say(f"{outcome.seconds:.0f} s → {run.rstrip('/')}/tables/{{{','.join(outcome.tables)}}}.parquet")
        for number, reason in outcome.quarantined.items():
            say(f"shard {number} quarantined: {reason}", "red")
        say_next(command_line("report", run))
    if outcome.quarantined:
        raise typer.Exit(INCOMPLETE)
