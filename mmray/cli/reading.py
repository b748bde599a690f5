"""What a run holds: its rankings and neurons."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mmray.features.select.settings import SelectionSettings, selection_settings
from mmray.terminal.options import AsJson, RunArgument, app, console, end, followed, say, with_settings


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
@with_settings(SelectionSettings)
def select(
    run: RunArgument,
    concepts: Annotated[list[str], typer.Argument(metavar="CONCEPT...", help="Nouns of the captions, such as dog.")],
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Choose a concept's neurons together: its noun goes with them, other nouns stay. Best after --score effect."""
    from mmray.engine import run as run_job
    from mmray.features.census.view import concept_title, ranking
    from mmray.features.select.job import SelectionJob, selections
    from mmray.runs.run import open_run

    checked = selection_settings({"run": run, "concepts": concepts, **settings})
    with followed() as follow:
        done = run_job(SelectionJob(checked), follow=follow)
    if as_json:
        print(json.dumps(done.headline["selections"], ensure_ascii=False))
    else:
        opened = open_run(run)
        for selection in selections(done, opened):
            console.print(ranking(selection.neurons, concept_title(opened, selection.concept), "selective"))
            say(
                f"ablated together, to first order: {selection.concept} falls by {selection.own:.2f} nats at "
                f"{selection.own_places} places, other nouns by {selection.others:.2f} at {selection.other_places}\n"
            )
    end(done, "sample", quiet=as_json)


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
