"""Files of a report: one that holds everything, or a folder whose pages load what they show."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmray.features import FEATURES
from mmray.report.content import Content, samples_of
from mmray.storage import Store

BEFORE = ("core.js", "images.js", "charts.js", "lists.js", "pages.js")
"""Scripts that the features' scripts build on, in order; `start.js` comes after those."""
PLOTLY = "plotly.min.js"
WRITERS = 16
"""Threads that write files, which mostly wait for the disk or S3."""


def write_whole(content: Content, images: Mapping[str, bytes]) -> bytes:
    """Return the report as one HTML file."""
    shown = {name: f"data:image/webp;base64,{base64.b64encode(data).decode()}" for name, data in images.items()}
    captions = {name: content.captions.get(name) for name in content.samples()}
    data = {"index": content.index, "parts": content.parts, "images": shown, "captions": captions}
    return _page(content.name, whole=True, data=embedded(data), plotly=_script(plotly())).encode()


def write_pages(content: Content, images: Mapping[str, bytes], store: Store) -> None:
    """Write the report as `index.html` and files that it loads when a page needs them."""
    paths = {name: f"images/{number:06d}.webp" for number, name in enumerate(sorted(images))}
    # Numbered, because names of concepts may not be valid in paths.
    files = {key: f"data/{number:06d}.js" for number, key in enumerate(content.parts)}
    contents = {path: images[name] for name, path in paths.items()}
    for key, part in content.parts.items():
        captions = {name: content.captions.get(name) for name in samples_of(part)}
        # A script rather than JSON: browsers let a page opened from disk load scripts, but not fetch files.
        contents[files[key]] = f"receive({embedded(key)},{embedded(part)},{embedded(captions)})".encode()
    data = {"index": content.index, "parts": {}, "files": files, "images": paths}
    data["captions"] = {name: content.captions.get(name) for name in content.of_sections()}
    contents["data/index.js"] = f"var DATA = {embedded(data)};".encode()
    contents[PLOTLY] = plotly().encode()
    with ThreadPoolExecutor(WRITERS) as pool:
        # As a list, so that an error of any write is raised.
        list(pool.map(lambda path: store.put(path, contents[path]), contents))
    # Last: once it is there, so is everything that it loads.
    store.put("index.html", live_page(content.name).encode())


def live_page(name: str, scripts: Sequence[str] = ()) -> str:
    """Return the page of the run of this name, which loads `data/index.js`; it has further scripts."""
    return _page(name, scripts, whole=False)


def _page(name: str, more_scripts: Sequence[str] = (), **more: Any) -> str:
    # Without autoescape: all values are this package's own text or escaped here. Text of the data is only in the JSON.
    environment = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_template("report.html"))
    title = name.replace("&", "&amp;").replace("<", "&lt;")
    return template.render(title=title, style=_template("report.css"), scripts=_scripts(more_scripts), **more)


def embedded(value: Any) -> str:
    """Return JSON that is safe inside HTML, and valid JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Line separators are legal in JSON, but ended a string in JavaScript before ES2019.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _script(text: str) -> str:
    # An HTML parser ends the script at this text, even inside a JavaScript string.
    return text.replace("</script", "<\\/script")


def _scripts(more: Sequence[str]) -> list[str]:
    packages = [feature.report.rpartition(".")[0] for feature in FEATURES.values() if feature.report]
    own = [(resources.files(package) / "report.js").read_text(encoding="utf-8") for package in packages]
    return [*map(_template, BEFORE), *own, *more, _template("start.js")]


@cache
def _template(name: str) -> str:
    return (resources.files("mmray.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """Return Plotly's script."""
    return (resources.files("plotly") / "package_data" / PLOTLY).read_text(encoding="utf-8")
