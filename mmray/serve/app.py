"""The web application of a served run: its routes, and who may use them.

It listens on 127.0.0.1 only. Every request needs the token: the first one brings it in its address, and a cookie keeps
it. Requests under another host name are refused, so that no web page can reach the server by a name that it controls.
"""

from __future__ import annotations

import base64
import hmac
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from mmray.data.images import decode_image
from mmray.errors import InputError
from mmray.report.pages import embedded, live_page, plotly
from mmray.serve.live import LiveRun

if TYPE_CHECKING:
    from mmray.serve.playground import Playground

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
# Scripts and styles stand in the page itself, hence `unsafe-inline`. Nothing may come from, or go to, another host.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# No referrer, because the first address has the token. No store, because tables change under the same address.
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
SCRIPTS = ("live.js", "query.js")
LARGEST_BODY = 16 << 20
"""Bytes of a request."""
SHOWN = 100
"""Rows of a list, unless more are asked for."""
MOST = 5000


class Server:
    """A run's pages; it reads the newest tables when a page is opened."""

    def __init__(self, uri: str, token: str, edits: Sequence[str] = (), playground: Playground | None = None) -> None:
        self.uri, self.token, self.edits, self.playground = uri, token, edits, playground
        self.live = LiveRun(uri, edits)
        self._opening = threading.Lock()

    def app(self) -> Starlette:
        """Return the web application."""
        routes = [
            Route("/", self._answer(self.page)),
            Route("/data/index.js", self._answer(self.index)),
            Route("/plotly.min.js", self._answer(lambda _: Response(plotly(), media_type="text/javascript"))),
            Route("/part", self._answer(self.part)),
            Route("/image", self._answer(self.image)),
            Route("/concepts", self._answer(self.concepts)),
            Route("/neurons", self._answer(self.neurons)),
            Route("/search", self._answer(self.search)),
            Route("/sql", self._answer(self.sql), methods=["POST"]),
        ]
        if self.playground is not None:
            routes += [
                Route("/map", self._answer(self.heat_map), methods=["POST"]),
                Route("/compare", self._answer(self.compare), methods=["POST"]),
            ]
        guards = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS)),
            Middleware(BaseHTTPMiddleware, dispatch=self._guard),
        ]
        return Starlette(routes=routes, middleware=guards)

    async def _guard(self, request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse requests without the token; put that of an address into a cookie."""
        # Browsers send a cookie to all ports of a host, so its name has the port.
        cookie = f"mmray-{request.url.port}"
        given = request.query_params.get("token")
        known = [value for value in (given, request.cookies.get(cookie)) if value]
        if not any(hmac.compare_digest(value.encode(), self.token.encode()) for value in known):
            answer: Response = Response("open the address that mmray serve printed, with its token\n", 403)
        elif given is not None and request.method == "GET":
            # Without the token, which would otherwise stay in the browser's history.
            rest = urlencode([pair for pair in parse_qsl(request.url.query) if pair[0] != "token"])
            answer = RedirectResponse(f"{request.url.path}{rest and '?'}{rest}")
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
        else:
            answer = await follow(request)
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        return answer

    def _answer(self, handle: Callable[[dict[str, Any]], Response]) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a function of a request's parameters; an InputError is answered with status 400."""

        async def endpoint(request: Request) -> Response:
            values: dict[str, Any] = dict(request.query_params)
            if request.method == "POST":
                # A body of unknown length is refused too: its size would show only while it is read.
                if int(request.headers.get("content-length", LARGEST_BODY + 1)) > LARGEST_BODY:
                    return JSONResponse({"error": f"more than {LARGEST_BODY >> 20} MB"}, 413)
                try:
                    values = json.loads(await request.body())
                except ValueError:
                    values = {}
            try:
                return await run_in_threadpool(handle, values)
            except InputError as error:
                return JSONResponse({"error": str(error)}, 400)
            except (KeyError, TypeError, ValueError) as error:
                return JSONResponse({"error": f"not a request of these pages ({type(error).__name__}: {error})"}, 400)

        return endpoint

    def page(self, values: dict[str, Any]) -> Response:
        """The page that loads everything else."""
        names = (*SCRIPTS, "playground.js") if self.playground else SCRIPTS
        scripts = [(resources.files("mmray.serve") / name).read_text(encoding="utf-8") for name in names]
        name = self.live.run.uri.rstrip("/").rpartition("/")[2]
        return Response(live_page(name, scripts), media_type="text/html; charset=utf-8")

    def index(self, values: dict[str, Any]) -> Response:
        """The index of the newest tables."""
        # Two pages that are opened at once would both copy the new tables.
        with self._opening:
            if not self.live.is_current():
                # The one before is not closed: other requests may still read it.
                self.live = LiveRun(self.uri, self.edits)
            data = self.live.index
        model = self.playground and {
            "name": self.playground.model.name,
            # The page warns where this is not the model that was analysed.
            "same": self.playground.model.digest == self.live.run.info["digests"].get("model"),
            "edits": list(self.playground.edits),
            "layers": len(self.playground.model.widths),
        }
        data = data | {"index": data["index"] | {"model": model, "tables": self.live.columns}}
        return Response(f"var DATA = {embedded(data)};", media_type="text/javascript; charset=utf-8")

    def part(self, values: dict[str, Any]) -> Response:
        """The page of a concept or neuron, by the report's key."""
        found = self.live.part(values["key"])
        return JSONResponse(found and {"value": found[0], "captions": found[1]}, 200 if found else 404)

    def image(self, values: dict[str, Any]) -> Response:
        """A sample's thumbnail."""
        found = self.live.picture(values["id"])
        if found is None:
            return Response("no image at hand", 404)
        return Response(found, media_type="image/webp", headers={"Cache-Control": "private, max-age=600"})

    def concepts(self, values: dict[str, Any]) -> Response:
        """Rows of the list of concepts."""
        found = self.live.concepts(values.get("words", ""), values.get("by", "n"), **_order(values))
        return JSONResponse(found)

    def neurons(self, values: dict[str, Any]) -> Response:
        """Rows of the list of neurons."""
        layer = int(values["layer"]) if values.get("layer") else None
        words, by = values.get("words", "").strip(), values.get("by", "n_concepts")
        return JSONResponse(self.live.catalog.neurons(words, layer, by, **_order(values)))

    def search(self, values: dict[str, Any]) -> Response:
        """Concepts and neurons by name or token."""
        return JSONResponse(self.live.catalog.search(values.get("words", "")))

    def sql(self, values: dict[str, Any]) -> Response:
        """The answer to a SELECT."""
        return JSONResponse(self.live.sql(str(values["query"])))

    def heat_map(self, values: dict[str, Any]) -> Response:
        """The heat map of neurons over a sample."""
        assert self.playground is not None
        found = self.playground.heat_map(self._image(values), _names(values["neurons"]), values.get("signs"))
        return JSONResponse(found)

    def compare(self, values: dict[str, Any]) -> Response:
        """Captions before and after a change."""
        assert self.playground is not None
        neurons, factor = _names(values.get("neurons", [])), float(values.get("factor", 0.0))
        found = self.playground.compare(
            self._image(values),
            prompt=values.get("prompt"),
            neurons=neurons,
            factor=factor,
            edit=values.get("edit"),
        )
        return JSONResponse(found)

    def _image(self, values: dict[str, Any]) -> Any:
        """Return a sample's image, or one that was sent."""
        if "image" in values:
            try:
                return decode_image(base64.b64decode(values["image"], validate=True))
            except ValueError as error:
                raise InputError(f"not an image that can be read ({error})") from error
        sample = self.live.sample(str(values["sample"]))
        return decode_image(sample.image or b"", sample.background)


def _order(values: dict[str, Any]) -> dict[str, Any]:
    return {"down": values.get("down", "1") == "1", "count": max(1, min(MOST, int(values.get("count", SHOWN))))}


def _names(neurons: Any) -> list[str]:
    """Return names of neurons, given as a list or as a text with blanks or commas."""
    return neurons.replace(",", " ").split() if isinstance(neurons, str) else [str(name) for name in neurons]


def edits_of(run_uri: str, folders: Sequence[str]) -> dict[str, str]:
    """Return name → folder of the edits in RUN/edits and in these folders."""
    from mmray.features.editing.files import FACTS_FILE
    from mmray.storage import open_store

    store = open_store(run_uri)
    own = [entry.key.rpartition("/")[0] for entry in store.list("edits/") if entry.key.endswith(f"/{FACTS_FILE}")]
    found = {key.removeprefix("edits/"): f"{store.uri}/{key}" for key in own}
    return found | {folder.rstrip("/").rpartition("/")[2]: folder for folder in folders}
