"""A run that is served in this process, and how tests ask it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import uvicorn

from mmray.serve.app import HOST, Server

TOKEN = "a-token-of-the-test"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to a server; the cookie with the token is sent unless `token` is changed."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(
        self, path: str, body: Any = None, *, token: str = TOKEN, host: str | None = None, **query: Any
    ) -> Answer:
        connection = HTTPConnection(HOST, self.port, timeout=60)
        headers = {"Cookie": f"mmray-{self.port}={token}", "Host": host or f"{HOST}:{self.port}"}
        data = None if body is None else json.dumps(body)
        where = f"/{path}{'?' if query else ''}{urlencode(query)}"
        connection.request("GET" if body is None else "POST", where, data, headers)
        found = connection.getresponse()
        answer = Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        connection.close()
        return answer


@contextmanager
def serving(run: Path, model: str | None = None, edits: dict[str, str] | None = None) -> Iterator[Client]:
    """Serve a run in a thread."""
    server = Server(str(run), TOKEN)
    if model is not None:
        from mmray.serve.playground import Playground

        server.playground = Playground(model, edits or {})
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen()
        running = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", access_log=False))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.02)
            yield Client(listening.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join()
            server.live.catalog.close()
