"""The command `mmray push`: a run's tables as a data set on the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from mmray.terminal.options import AsJson, RunArgument, app, say, say_json, say_next


@app.command(
    group="Read", examples=("mmray push runs/llava org/llava-neurons", "mmray push runs/llava org/x --private")
)
def push(
    run: RunArgument,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Data set on the hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private data set.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Upload the report too, which shows images.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a run's tables and data card to the Hugging Face hub."""
    from mmray.report.writing import shareable_report
    from mmray.runs.hub import push_run
    from mmray.runs.run import open_run

    opened = open_run(run)
    url = push_run(opened, repository, private=private, report=shareable_report(opened) if report else None)
    if as_json:
        say_json({"url": url})
    else:
        say(url)
        say_next(f'datasets.load_dataset("{repository}", "rankings")')
