"""A stand-in for the API of the Hugging Face hub on loopback: data sets are created, and commits add files to them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was created and uploaded."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits = 0
        self.refuses = False


@contextmanager
def hub_here() -> Iterator[Hub]:
    """Serve a stand-in inside the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            # Uploads are sent in chunks, without a length.
            body = self.rfile.read(int(length)) if (length := self.headers.get("Content-Length")) else _chunks(self)
            status, answer = (403, {"error": "no"}) if hub.refuses else _answer(hub, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()


def _chunks(handler: BaseHTTPRequestHandler) -> bytes:
    found = b""
    while size := int(handler.rfile.readline(), 16):
        found += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return found


def _answer(hub: Hub, path: str, body: bytes) -> tuple[int, Any]:
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        address = {"url": f"{hub.endpoint}/datasets/{name}", "name": name}
        if name in hub.files:
            return 409, address
        hub.files[name], hub.private[name] = {}, bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, address
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    name, _, rest = path.removeprefix("/api/datasets/").partition("/preupload/")
    if rest:
        asked = json.loads(body)["files"]
        return 200, {
            "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
        }
    name = name.partition("/commit/")[0]
    for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
            hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    hub.commits += 1
    return 200, {
        "commitUrl": f"{hub.endpoint}/datasets/{name}/commit/{hub.commits:040x}",
        "commitOid": f"{hub.commits:040x}",
        "hookOutput": "",
    }
