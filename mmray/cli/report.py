"""The command `mmray report`: a run's results as pages for a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from mmray.terminal.options import RunArgument, app, command_line, console, say, say_next


@app.command(
    group="Read", examples=("mmray report runs/llava", "mmray report runs/llava --pages site --edit edits/dog-cat")
)
def report(
    run: RunArgument,
    out: Annotated[
        str | None,
        typer.Option("--out", help="HTML file to write, a local path or s3://bucket/key; default: RUN/report.html."),
    ] = None,
    pages: Annotated[
        str | None,
        typer.Option(
            "--pages",
            metavar="DIR",
            help="Write a folder of small files instead, index.html first: for runs with thousands of concepts.",
        ),
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit", metavar="EDIT", help="Folder of a further edit to show in addition to RUN/edits/*; repeatable."
        ),
    ] = None,
) -> None:
    """Write what a run found as one HTML file that needs no network."""
    from mmray.report.writing import write_report
    from mmray.runs.run import open_run

    opened = open_run(run)
    with console.status("writing the report"):
        written = write_report(opened, out, edit or (), pages)
    say(written)
    # The most frequent concepts have the most reliable rankings.
    source, target = [*opened.concepts, "CONCEPT", "CONCEPT"][:2]
    edited = command_line("edit", run, "--source", source, "--target", target, "--out", "EDIT")
    say_next(command_line("serve", run, "--model", "run"), edited)
