"""What `mmray serve` takes for a large run: `python -m tests.bench.serve [--concepts N] [--run DIR] [--write]`.

The run is drawn at random, with the shape of LLaVA-1.5-7B (32 × 11,008 neurons) and all rows that a census would write:
256 ranked neurons per concept, ten examples and two labels per neuron, and occurrences by Zipf's law. Its data has no
pictures. Every figure is of requests to a new server process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import quote
from urllib.request import HTTPCookieProcessor, Request, build_opener

import numpy as np
import pyarrow as pa

from mmray.features.census.settings import census_settings
from mmray.features.census.tables import NEURON_ENTRY, TABLES
from mmray.runs import RunFolder
from mmray.runs.concepts import summarise_rankings
from mmray.runs.snapshots import SnapshotWriter
from mmray.storage import LocalStore
from tests.bench.writing import markdown, write

COMMAND = "python -m tests.bench.serve --write"
WIDTHS = (11_008,) * 32
RANKED, LISTED, EXTREMES = 256, 20, 5
"""Neurons per concept and per occurrence, and examples per neuron of each sign."""
CAPTIONS, SHARD, OCCURRENCES = 600_000, 500, 2_000_000
VOCABULARY = 30_000
CHUNK = 200
"""Concepts written at a time."""
ASKED = 12
"""Requests of each kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--concepts", type=int, default=100_000)
    parser.add_argument("--run", type=Path, help="folder to keep the run in, or to read it from")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or Path(folder) / "run"
        if not (run / "run.json").exists():
            draw(run, arguments.concepts)
        table = markdown(["", "slowest", "median", "CPU, mean"], measured(run, arguments.concepts))
    print(table)
    if arguments.write:
        write("tests/bench/README.md", COMMAND, table)


def draw(
    run: Path,
    concepts: int,
    widths: tuple[int, ...] = WIDTHS,
    captions: int = CAPTIONS,
    occurrences: int = OCCURRENCES,
) -> None:
    """Write a run of random tables."""
    drawn, store = np.random.default_rng(0), LocalStore(run)
    words = pa.array([f"token{number}" for number in range(VOCABULARY)])
    names = pa.array(sorted(f"noun {number:06d}" for number in range(concepts)))
    # Zipf's law over concepts in random order; each occurs at least once.
    chances = 1 / (1 + drawn.permutation(concepts))
    counts = np.maximum(1, np.round(occurrences * chances / chances.sum())).astype(np.int64)
    writer, summaries = SnapshotWriter(store, "census", 1), []
    for start in range(0, concepts, CHUNK):
        own = np.arange(start, min(concepts, start + CHUNK))
        part = _rankings(drawn, names, words, own, counts[own], widths)
        writer.add("rankings", part)
        summaries.append(summarise_rankings(part))
    writer.add("concepts", pa.concat_tables(summaries))
    for layer, width in enumerate(widths):
        for name, part in _of_layer(drawn, names, words, counts, layer, width, widths, captions):
            writer.add(name, part)
    for part in _captions(captions):
        writer.add("captions", part)
    for start in range(0, int(counts.sum()), 100_000):
        own = drawn.choice(concepts, min(100_000, int(counts.sum()) - start), p=counts / counts.sum())
        writer.add("occurrences", _occurrences(drawn, names, words, own, widths, captions))
    writer.add("errors", TABLES["errors"].empty_table())
    writer.commit({"receipts": ""}, {"certified": 1.0})
    settings = census_settings({"model": "demo", "data": "demo", "out": str(run)}).model_dump()
    model = {"type": "llava", "parameters": 7_063_427_072, "layers": len(widths), "widths": widths}
    info = {
        "fingerprint": "drawn",
        "digests": {},
        "result_settings": {},
        "versions": {"mmray": "drawn"},
        "nouns": "drawn",
    }
    data = {"samples": captions, "columns": {}}
    RunFolder(store).begin(info | {"settings": settings, "model": model, "data": data, "shards": 1, "home": "."}, b"{}")


def _table(name: str, columns: dict[str, object]) -> pa.Table:
    """Return a table of that schema; columns that are not given are null."""
    rows = len(next(iter(columns.values())))  # type: ignore[arg-type]
    schema = TABLES[name]
    return pa.table(
        [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema],
        schema=schema,
    )


def _lists(values: pa.Array, length: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), values)


def _tokens(drawn: np.random.Generator, words: pa.Array, rows: int) -> pa.ListArray:
    return _lists(words.take(pa.array(drawn.integers(0, len(words), 10 * rows))), 10)


def _rankings(
    drawn: np.random.Generator,
    names: pa.Array,
    words: pa.Array,
    own: np.ndarray,
    counts: np.ndarray,
    widths: tuple[int, ...],
) -> pa.Table:
    rows = RANKED * len(own)
    rank = np.tile(np.arange(1, RANKED + 1, dtype=np.int32), len(own))
    layer, unit = drawn.integers(0, len(widths), rows), drawn.integers(0, widths[0], rows)
    score = 8.0 * drawn.random(rows) / rank
    specific_rank = np.concatenate([1 + drawn.permutation(RANKED) for _ in own])
    return _table(
        "rankings",
        {
            "concept": names.take(pa.array(np.repeat(own, RANKED))),
            "rank": rank,
            "layer": layer,
            "unit": unit,
            "neuron": [f"L{one}.u{other}" for one, other in zip(layer.tolist(), unit.tolist(), strict=True)],
            "score": score,
            "score_std": score / 3,
            "specific": 0.9 * score,
            "specific_rank": specific_rank,
            "n": np.repeat(counts, RANKED),
            "n_images": np.repeat(counts, RANKED),
            "share": drawn.random(rows),
            "activation": drawn.normal(size=rows),
            "tokens": _tokens(drawn, words, rows),
            "certified": drawn.random(rows) < 0.9,
            "selective": 0.8 * score,
            "selective_rank": specific_rank,
        },
    )


def _of_layer(
    drawn: np.random.Generator,
    names: pa.Array,
    words: pa.Array,
    counts: np.ndarray,
    layer: int,
    width: int,
    widths: tuple[int, ...],
    captions: int,
) -> Iterator[tuple[str, pa.Table]]:
    """Yield a layer's rows of the tables that are in the order of neurons."""
    used = len(names) * RANKED // sum(widths)
    units = np.arange(width)
    tokens = drawn.integers(1, 10**7, width)
    yield (
        "neurons",
        _table(
            "neurons",
            {
                "layer": np.full(width, layer),
                "unit": units,
                "neuron": [f"L{layer}.u{unit}" for unit in units.tolist()],
                "n_concepts": drawn.poisson(used / 10, width),
                "n_tokens": np.full(width, 10**7),
                "n_active": tokens,
                **{name: drawn.normal(size=width) for name in ("mean", "std", "max", "min")},
                "tokens": _tokens(drawn, words, width),
                "suppressed": _tokens(drawn, words, width),
            },
        ),
    )
    own = drawn.integers(0, len(names), width * used)
    rank = np.sort(drawn.integers(1, RANKED + 1, (width, used)), axis=1).reshape(-1)
    yield (
        "neuron_concepts",
        _table(
            "neuron_concepts",
            {
                "layer": np.full(width * used, layer),
                "unit": np.repeat(units, used),
                "concept": names.take(pa.array(own)),
                "rank": rank,
                **{name: drawn.random(width * used) for name in ("score", "specific", "selective", "share")},
                "specific_rank": rank,
                "n": counts[own],
                "activation": drawn.normal(size=width * used),
            },
        ),
    )
    rows = 2 * EXTREMES * width
    yield (
        "examples",
        _table(
            "examples",
            {
                "layer": np.full(rows, layer),
                "unit": np.repeat(units, 2 * EXTREMES),
                "sign": np.tile(np.repeat([1, -1], EXTREMES), width),
                "rank": np.tile(np.arange(1, EXTREMES + 1), 2 * width),
                "sample_id": _samples(sample := drawn.integers(0, captions, rows), captions),
                "shard_id": sample // SHARD,
                "position": drawn.integers(0, 600, rows),
                "activation": drawn.normal(size=rows),
            },
        ),
    )
    for kind, label in (("all", "all"), ("language", "en")):
        for modality in ("image", "text"):
            columns = {"label_kind": [kind] * width, "label": [label] * width, "modality": [modality] * width}
            numbers = {
                "layer": np.full(width, layer),
                "unit": units,
                "n_tokens": np.full(width, 10**7),
                "n_active": tokens,
            }
            sums = {"sum": drawn.normal(size=width), "module": ["language"] * width}
            yield "activity", _table("activity", columns | numbers | sums)


@cache
def _digests(captions: int) -> pa.Array:
    return pa.array([sha256(str(number).encode()).hexdigest() for number in range(captions)])


def _samples(numbers: np.ndarray, captions: int) -> pa.Array:
    return _digests(captions).take(pa.array(numbers))


def _captions(count: int) -> Iterator[pa.Table]:
    for start in range(0, count, 50_000):
        numbers = np.arange(start, min(count, start + 50_000))
        rows = {
            "sample_id": _samples(numbers, count),
            "caption": [f"A caption of picture {number}." for number in numbers],
        }
        yield _table("captions", rows | {"language": ["en"] * len(numbers), "shard_id": numbers // SHARD})


def _occurrences(
    drawn: np.random.Generator,
    names: pa.Array,
    words: pa.Array,
    own: np.ndarray,
    widths: tuple[int, ...],
    captions: int,
) -> pa.Table:
    entries = LISTED * len(own)
    values = [drawn.integers(0, len(widths), entries), drawn.integers(0, widths[0], entries)]
    values += [drawn.random(entries), drawn.random(entries)]
    arrays = [pa.array(value, f.type) for value, f in zip(values, NEURON_ENTRY, strict=True)]
    return _table(
        "occurrences",
        {
            "sample_id": _samples(drawn.integers(0, captions, len(own)), captions),
            "concept": names.take(pa.array(own)),
            "token": words.take(pa.array(own % VOCABULARY)),
            "token_id": own % VOCABULARY,
            "position": drawn.integers(0, 600, len(own)),
            "log_prob": -drawn.random(len(own)),
            "neurons": _lists(pa.StructArray.from_arrays(arrays, fields=list(NEURON_ENTRY)), LISTED),
        },
    )


def measured(run: Path, concepts: int) -> list[list[str]]:
    """Return the rows of the table: a new server's start, requests of each kind, and its memory."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "mmray", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address, "the server did not start"
            started, begun = time.perf_counter() - began, processor_seconds(server.pid)
            opener = build_opener(HTTPCookieProcessor(CookieJar()))

            def ask(path: str, body: object = None) -> bytes:
                data = None if body is None else json.dumps(body).encode()
                given = Request(address[0].partition("?")[0] + path, data, {"Content-Type": "application/json"})
                return bytes(opener.open(given).read())

            def timed(*requests: Callable[[], object]) -> list[str]:
                took, used = [], processor_seconds(server.pid)
                for request in requests:
                    start = time.perf_counter()
                    request()
                    took.append(time.perf_counter() - start)
                used = (processor_seconds(server.pid) - used) / len(requests)
                return [f"{max(took):.2f} s", f"{sorted(took)[len(took) // 2]:.2f} s", f"{used:.2f} s"]

            drawn = random.Random(1)
            nouns = [f"noun {drawn.randrange(concepts):06d}" for _ in range(ASKED)]
            neurons = [f"L{drawn.randrange(len(WIDTHS))}.u{drawn.randrange(WIDTHS[0])}" for _ in range(ASKED)]
            words = [*(noun[: 6 + at % 6] for at, noun in enumerate(nouns)), "L7.u8", "token77", "n"]
            first = timed(lambda: (opener.open(address[0]).read(), ask("data/index.js"), ask("plotly.min.js")))
            frequent = json.loads(ask("concepts?count=50"))["rows"]
            nouns += [row["name"] for row in frequent[:4]]
            lists = [f"concepts?by={by}&down=1&count=50" for by in ("n", "score", "specific", "concept")]
            lists += [f"neurons?by={by}&down=1&count=50" for by in ("n_concepts", "open", "max", "neuron")]
            query = "select layer, count(*) from rankings where rank <= 10 group by layer"
            kinds = {
                "search": [f"search?words={quote(word)}" for word in words],
                "page of a neuron": [f"part?key=n:{name}" for name in neurons],
                "page of a concept": [f"part?key=c:{quote(name)}" for name in nouns],
                "list in another order": lists,
            }
            rows = [["first page", *first]]
            for name, paths in kinds.items():
                rows.append([name, *timed(*(lambda path=path: ask(path) for path in paths))])
            rows.append(["SQL over all rankings", *timed(lambda: ask("sql", {"query": query}))])
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1e6
            return [
                ["start of the server", f"{started:.1f} s", "", f"{begun:.1f} s"],
                *rows,
                ["peak memory", f"{peak:.2f} GB", "", ""],
            ]
        finally:
            server.terminate()


def processor_seconds(process: int) -> float:
    """Return the CPU time of a process so far."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
