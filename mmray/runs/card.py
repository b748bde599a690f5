"""A run's data card: the README.md that makes its folder a data set for `datasets` and the Hugging Face hub.

The front matter has a configuration per table, so that `datasets.load_dataset(RUN, "rankings")` reads one. The text
says what was analysed, and the columns of each table with their units; no path of the machine that made the run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import yaml

from mmray.features import command_for, table_schemas
from mmray.runs.snapshots import Snapshot, newest_readable, publish_tables, snapshots
from mmray.storage import Store, masked

CARD = "README.md"
FIRST = "rankings"
"""The table that is read if none is named."""
MADE = "<!-- Written by mmray; edit a copy. -->"
"""Marks a card that may be replaced."""
TOLD = ("score", "fold_norm", "captions", "dtype", "prompt", "prefix", "language", "limit", "top_k", "nouns")
"""Settings of the census that a card tells."""


def publish(store: Store, snapshot: Snapshot) -> None:
    """Copy a snapshot's tables for other tools, and write the card of the run that they belong to."""
    publish_tables(store, snapshot)
    write_card(store)


def write_card(store: Store) -> None:
    """Write the card of a run's folder from its newest tables; does nothing if the folder is no census's.

    A README.md that somebody else wrote stays.
    """
    info, before = _content(store, "run.json"), _content(store, CARD)
    if info is None or (before is not None and MADE.encode() not in before):
        return
    if (census := json.loads(info)).get("job") == "census":
        store.put(CARD, card(store, census).encode())


def _content(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except FileNotFoundError:
        return None


def card(store: Store, info: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Return the text of a run's card; `info` is the content of its run.json, `without` has tables to leave out."""
    rows = {name: count for name, count in _rows(store).items() if name not in without}
    front = {
        "pretty_name": f"Neurons of {public_name(info['settings']['model'])}",
        "tags": ["interpretability", "mmray", "multimodal-neurons"],
        "configs": [
            {"config_name": name, "data_files": files, **({"default": True} if name == FIRST else {})}
            for name, files in _files(store, rows).items()
        ],
    }
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n{MADE}\n\n" + "\n".join([*_introduction(info), *_tables(rows)]) + "\n"


def _rows(store: Store) -> dict[str, int]:
    """Return table → rows, for the tables of all analyses in the order of the registry."""
    found = {}
    for job in snapshots(store):
        snapshot = newest_readable(store, job)
        for name, files in (snapshot.tables if snapshot else {}).items():
            found[name] = sum(file.checksum.rows or 0 for file in files)
    return {name: found[name] for name in table_schemas() if name in found}


def _files(store: Store, rows: Mapping[str, int]) -> dict[str, str]:
    """Return table → its file or files, as a pattern. An empty table has none: `datasets` can't read it."""
    # A table of several files is a folder; which ones are depends on their size.
    keys = [entry.key for entry in store.list("tables/")]
    folders = {name for name in rows if any(key.startswith(f"tables/{name}.parquet/") for key in keys)}
    return {name: f"tables/{name}.parquet" + "/*" * (name in folders) for name, count in rows.items() if count}


def _introduction(info: Mapping[str, Any]) -> Iterator[str]:
    settings, model, data = info["settings"], info["model"], info["data"]
    name, source = public_name(settings["model"]), public_name(settings["data"])
    yield f"# Neurons of {name}"
    yield ""
    yield f"A census by mmray {info['versions']['mmray']}: how much every MLP neuron of the model contributes to nouns"
    yield f"in captions of {source}. Scores are means over a noun's occurrences (Pan et al. 2024,"
    yield "[*Finding and Editing Multi-Modal Neurons*](https://arxiv.org/abs/2311.07470))."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| model | {name}, {model['parameters']:,} parameters, digest `{info['digests']['model']}` |"
    yield f"| neurons | {sum(model['widths']):,} in {model['layers']} layers |"
    yield f"| data | {source}, {data['samples']:,} samples |"
    # Nouns may be of a lexicon, which is a file.
    shown = settings | {"nouns": public_name(settings["nouns"])}
    told = [f"{key} {shown[key]}" for key in TOLD if shown.get(key) not in (None, False)]
    yield f"| settings | {' '.join(', '.join(told).split()).replace('|', '/')} |"
    yield f"| versions | {', '.join(f'{name} {version}' for name, version in info['versions'].items())} |"
    yield ""
    yield "```python"
    yield "import datasets"
    yield ""
    yield f'datasets.load_dataset("FOLDER", "{FIRST}")  # this folder or its name on the hub, and a table'
    yield "```"
    yield ""
    yield "The licence of the captions and images is that of the data."


def _tables(rows: Mapping[str, int]) -> Iterator[str]:
    for name, schema in table_schemas().items():
        if name in rows:
            yield ""
            yield f"## {name}"
            yield ""
            yield f"{rows[name]:,} rows, written by `{command_for(name)}`."
            yield ""
            yield "| column | type | unit |"
            yield "|---|---|---|"
            yield from (f"| {column.name} | {column.type} | {_unit(column)} |" for column in schema)


def _unit(column: pa.Field) -> str:
    unit: bytes = (column.metadata or {}).get(b"unit", b"")
    return unit.decode().replace("|", "/")


def public_name(place: str) -> str:
    """Return a model's or data set's name without where it lies on this machine, and without passwords."""
    if "://" in place:
        return masked(place)
    # A hub id has one slash, and is no path of a machine.
    local = PurePath(place).is_absolute() or place.startswith((".", "~")) or place.count("/") > 1
    return PurePath(place).name if local else place
