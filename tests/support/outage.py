"""An S3 whose answers can be switched to 503: a proxy before another one."""

import http.client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import urlsplit


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an endpoint, or refuses them all while `down` is set."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.endpoint = urlsplit(endpoint).netloc
        self.down = Event()
        self.refused = 0
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Or every answer's body would wait 40 ms until its header is acknowledged.
    disable_nagle_algorithm = True
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.down.is_set():
            self.server.refused += 1
            self.reply(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>Please try again.</Message></Error>")
            return
        connection = http.client.HTTPConnection(self.server.endpoint)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        self.reply(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""
