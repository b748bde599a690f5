"""The command `mmray export`: a run's results in files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmray.errors import InputError
from mmray.terminal.options import AsJson, RunArgument, app, command_line, plural, say, say_json, say_next


@app.command(
    group="Read",
    examples=("mmray export runs/llava --csv --out csv", "mmray export runs/llava --neuronpedia --out neuronpedia"),
)
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Local folder to write to.")],
    csv: Annotated[bool, typer.Option("--csv", help="Each table as a CSV file; lists are JSON.")] = False,
    neuronpedia: Annotated[
        bool, typer.Option("--neuronpedia", help="Neurons in the batches of JSON that Neuronpedia takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's tables as CSV, or its neurons in Neuronpedia's format."""
    from mmray.runs.export import export_csv, export_neuronpedia
    from mmray.runs.run import open_run

    if csv == neuronpedia:
        raise InputError("give --csv or --neuronpedia")
    files = (export_csv if csv else export_neuronpedia)(open_run(run), out)
    if as_json:
        say_json([str(file) for file in files])
    else:
        say(f"{plural(len(files), 'file')} → {out}")
        say_next(command_line("report", run))
