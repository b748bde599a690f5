"""The command `mmray serve`: a run's pages over its live tables, for a browser on this machine."""

from __future__ import annotations

import secrets
import socket
import sys
from typing import Annotated

import typer

from mmray.errors import InputError
from mmray.terminal.options import RunArgument, app, command_line, say, say_next

RUN_MODEL = "run"
"""Value of --model that stands for the run's own model."""
PORT = 8765


@app.command(
    group="Read",
    examples=("mmray serve runs/llava", "mmray serve s3://bucket/runs/llava --model run --edit edits/dog-cat"),
)
def serve(
    run: RunArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Model for heat maps of any neurons and for the playground; 'run' is the run's own.",
        ),
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option("--edit", metavar="EDIT", help="Folder of a further edit, next to RUN/edits/*; repeatable."),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = PORT,
) -> None:
    """Show a run of any size in the browser: its pages, SQL, and a playground."""
    import uvicorn

    from mmray.serve.app import HOST, Server, edits_of

    folders, token = edit or (), secrets.token_urlsafe(24)
    with socket.socket() as listening:
        # Otherwise the port of a server that has just ended is refused for a minute.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; take another one, or 0 for a free one") from error
        server = Server(run, token, folders)
        if model is not None:
            from mmray.serve.playground import Playground

            name = server.live.run.info["settings"]["model"] if model == RUN_MODEL else model
            say(f"loading model {name}")
            server.playground = Playground(name, edits_of(server.live.run.uri, folders))
        # Before the address is printed: a browser that is faster than the server waits.
        listening.listen()
        say(f"http://{HOST}:{listening.getsockname()[1]}/?token={token}")
        more = "" if model else f"; {command_line('serve', run, '--model', 'run')} adds heat maps and a playground"
        say_next(f"open it{more}; Ctrl-C stops")
        sys.stdout.flush()
        config = uvicorn.Config(server.app(), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])
