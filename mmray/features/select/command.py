"""The command `select`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mmray.features.select.settings import SelectionSettings, selection_settings
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


@app.command(group="Understand", examples=("mmray select runs/llava dog", "mmray select runs/llava dog cat --k 100"))
@with_settings(SelectionSettings)
def select(
    run: RunArgument,
    concepts: Annotated[list[str], typer.Argument(metavar="CONCEPT...", help="Nouns of the captions, such as dog.")],
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Choose neurons whose joint removal suppresses a noun and keeps others."""
    from mmray.features.census.view import concept_title, ranking
    from mmray.features.select.job import SelectionJob, selections
    from mmray.runs.run import open_run

    checked = selection_settings({"run": run, "concepts": concepts, **settings})
    done = run_with_progress(SelectionJob(checked))
    if as_json:
        say_json(done.headline["selections"])
    else:
        opened = open_run(run)
        found = selections(done, opened)
        for selection in found:
            console.print(ranking(selection.neurons, concept_title(opened, selection.neurons), "selective"))
            say(
                f"ablated together, to first order: {selection.concept} falls by {selection.own:.2f} nats at "
                f"{selection.own_places} places, other nouns by {selection.others:.2f} at {selection.other_places}\n"
            )
        highest = (selection.neurons["neuron"][0].as_py() for selection in found)
        say_next(*(command_line("neuron", run, neuron) for neuron in highest))
    finish(done, "sample", quiet=as_json)
