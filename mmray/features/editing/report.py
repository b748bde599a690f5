"""The edits of a report: what each was for, what it changed and where, its measures and its captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load

from mmray.data.image_keys import image_key, one_per_image
from mmray.errors import DamagedError, InputError
from mmray.features.editing.files import CAPTIONS_FILE, EVALUATION_FILE
from mmray.report.concepts import number
from mmray.report.section import Request, Section
from mmray.runs.run import Run
from mmray.runs.tables import read_file, read_table
from mmray.storage import Checksum, Store, open_store

SHOWN = 12
"""Captions of an edit that are shown: first those that changed, of the samples that it should change."""
STRONGEST = 8
ORDER = {"source": 0, "edited": 1, "other": 2, "unrelated": 3}


@dataclass
class EditPage:
    """An edit as a page shows it; `data` is where its captions' images lie."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    measures: list[dict[str, Any]] = field(default_factory=list)
    captions: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)
    data: str | None = None

    def page(self) -> dict[str, Any]:
        """Return what the page shows."""
        return {
            "name": self.name,
            "facts": self.facts,
            "measures": self.measures,
            "captions": self.captions,
            "changed": self.changed,
        }


def section(request: Request) -> Section:
    """Return the page of every edit, and the images of its captions; raises InputError as `read_edits`."""
    found = read_edits(request.run, request.edits)
    shown = [(edit.data, frozenset(row["id"] for row in edit.captions)) for edit in found]
    return Section(
        [edit.page() for edit in found], elsewhere=[(data, names) for data, names in shown if data and names]
    )


def read_edits(run: Run, folders: Sequence[str]) -> list[EditPage]:
    """Return the edits in the folders given, those in RUN/edits, and those of the run's own tables; each name once.

    Raises InputError for a given folder without an edit.
    """
    found = {}
    for folder in folders:
        edit = _from_folder(open_store(folder), "", folder.rstrip("/").rpartition("/")[2])
        if edit is None:
            raise InputError(f"--edit {folder}: no edit here (no edit.json); give a folder that mmray edit wrote")
        found[edit.name] = edit
    store = run.folder.store
    for entry in store.list("edits/"):
        place, _, key = entry.key.rpartition("/")
        if key == "edit.json":
            name = place.removeprefix("edits/")
            edit = _from_folder(store, f"{place}/", name)
            if edit is not None:
                found.setdefault(name, edit)
    for edit in _from_tables(store):
        found.setdefault(edit.name, edit)
    return list(found.values())


def _from_folder(store: Store, prefix: str, name: str) -> EditPage | None:
    facts = _json(store, f"{prefix}edit.json")
    if facts is None:
        return None
    purposes = facts.get("purposes", [])
    said = " · ".join(_purpose(purpose) for purpose in purposes)
    cost = {key: value for key, value in facts.get("facts", {}).items() if isinstance(value, int | float | str)}
    shown = {"purpose": said, "method": " · ".join(_methods(facts.get("settings", {}))) or None, **cost}
    evaluation = _json(store, f"{prefix}{EVALUATION_FILE}") or {}
    measures = [{"measure": measure, **values} for measure, values in evaluation.get("measures", {}).items()]
    captions = _table(store, f"{prefix}{CAPTIONS_FILE}")
    rows = captions.to_pylist() if captions is not None else []
    return EditPage(
        name,
        {key: value for key, value in shown.items() if value is not None},
        [_measure(row) for row in measures if row.get("n")],
        _chosen(rows),
        _changed(store, f"{prefix}edit.safetensors", facts.get("rows")),
        evaluation.get("data"),
    )


def _methods(settings: dict[str, Any]) -> list[str]:
    """Return the methods by which an edit, or each of those that were added up, was made."""
    parts = [_methods(part) for part in settings.get("sum", [])]
    return list(dict.fromkeys([*chain(*parts), *(wish["method"] for wish in settings.get("wishes", []))]))


def _from_tables(store: Store) -> list[EditPage]:
    """Return the edits of a pipeline's run; none where it has no such tables."""
    tables = {}
    for name in ("edits", "evaluations", "edit_captions"):
        try:
            tables[name] = read_table(store, name).to_pylist()
        except FileNotFoundError:
            tables[name] = []
    found = []
    for facts in tables["edits"]:
        name = str(facts.pop("edit"))
        measures = [_measure(row) for row in tables["evaluations"] if row["edit"] == name and row.get("n")]
        captions = [row for row in tables["edit_captions"] if row["edit"] == name]
        shown = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
        found.append(EditPage(name, shown, measures, _chosen(captions)))
    return found


def _purpose(purpose: Mapping[str, Any]) -> str:
    if purpose.get("source") and purpose.get("target"):
        return f"{purpose['source']} → {purpose['target']}"
    return f"{purpose.get('kind', 'edit')} {purpose.get('source') or ''}".strip()


def _measure(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: number(row.get(key)) for key in ("before", "after", "low", "high")}
    return numbers | {"measure": row["measure"], "n": row["n"], "protocol": row.get("protocol") or ""}


def _chosen(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return captions to show, each of another image: changed ones first, those that it should change before others."""

    def order(row: Mapping[str, Any]) -> tuple[bool, int, str]:
        return row["before"] == row["after"], ORDER.get(str(row.get("role")), 2), row["sample_id"]

    images = {row["sample_id"]: image_key(row["sample_id"], row.get("image")) for row in rows}
    by_name = {row["sample_id"]: row for row in sorted(rows, key=order)}
    chosen = [by_name[name] for name in one_per_image(by_name, images)[:SHOWN]]
    return [
        {"id": row["sample_id"], "before": row["before"], "after": row["after"], "role": row.get("role")}
        for row in chosen
    ]


def _changed(store: Store, key: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """Return how many rows of each layer the edit changes, and the neurons that it changes most.

    `known` is what edit.json says of the file; edits of earlier versions have nothing there.
    """
    try:
        data = store.read(key)
        if known is not None:
            Checksum(**known).check(data)
        rows = load(data)
    except FileNotFoundError:
        return {}
    except (DamagedError, SafetensorError) as error:
        raise InputError(f"{store.uri}/{key}: damaged ({error}); make the edit again") from error
    sizes = np.linalg.norm(rows["delta"].astype(np.float64), axis=1)
    layers, units = rows["layer"].tolist(), rows["unit"].tolist()
    strongest = np.argsort(-sizes, kind="stable")[:STRONGEST].tolist()
    return {
        "layers": dict(sorted(Counter(layers).items())),
        "strongest": [{"neuron": f"L{layers[at]}.u{units[at]}", "norm": number(float(sizes[at]))} for at in strongest],
    }


def _json(store: Store, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(store.read(key))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{store.uri}/{key}: not JSON ({error}); make the edit again") from error
    return found


def _table(store: Store, key: str) -> pa.Table | None:
    try:
        return read_file(store, key)
    except FileNotFoundError:
        return None
