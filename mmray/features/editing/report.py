"""The report's page of edits: what each was for, what it changed and where, its measures and its captions."""

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
from mmray.features.editing.bounds import verdict
from mmray.features.editing.files import CAPTIONS_FILE, EVALUATION_FILE, FACTS_FILE, ROWS_FILE
from mmray.features.editing.labels import COMPARED, label_of
from mmray.neuron_names import NeuronNames
from mmray.report.concepts import number
from mmray.report.section import Request, Section
from mmray.runs.run import Run
from mmray.runs.tables import read_file, read_table
from mmray.storage import Checksum, Store, open_store

SHOWN = 12
"""Captions shown per edit."""
STRONGEST = 8
"""Neurons shown per edit: those that it changes most."""
ROLE_ORDER = {"source": 0, "edited": 1, "other": 2, "unrelated": 3}


@dataclass
class EditPage:
    """An edit as the page shows it; `data` holds the images of its captions."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    measures: list[dict[str, Any]] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    """What the measures say of it; None: it was never evaluated."""
    captions: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)
    data: str | None = None


def section(request: Request) -> Section:
    """Return the page of every edit, and which images its captions need; raises InputError as `read_edits`."""
    found = read_edits(request.run, request.edits)
    shown = [(edit.data, frozenset(row["id"] for row in edit.captions)) for edit in found]
    pages = [{name: value for name, value in vars(edit).items() if name != "data"} for edit in found]
    return Section(pages, elsewhere=[(data, names) for data, names in shown if data and names])


def read_edits(run: Run, folders: Sequence[str]) -> list[EditPage]:
    """Return the edits in the given folders, in RUN/edits, and in the run's own tables; the first of each name counts.

    Raises InputError if a given folder has no edit.
    """
    found = {}
    for folder in folders:
        edit = _from_folder(open_store(folder), "", folder.rstrip("/").rpartition("/")[2], run.names)
        if edit is None:
            raise InputError(f"--edit {folder}: no edit here (no {FACTS_FILE}); give a folder that mmray edit wrote")
        found[edit.name] = edit
    store = run.folder.store
    for entry in store.list("edits/"):
        folder, _, file = entry.key.rpartition("/")
        # Written last: a folder without it holds an edit that was never finished.
        if file == FACTS_FILE:
            name = folder.removeprefix("edits/")
            edit = _from_folder(store, f"{folder}/", name, run.names)
            if edit is not None:
                found.setdefault(name, edit)
    for edit in _from_tables(store):
        found.setdefault(edit.name, edit)
    return list(found.values())


def _from_folder(store: Store, prefix: str, name: str, names: NeuronNames) -> EditPage | None:
    facts = _json(store, f"{prefix}{FACTS_FILE}")
    if facts is None:
        return None
    purpose = " · ".join(_purpose(row) for row in facts.get("purposes", []))
    cost = {key: value for key, value in facts.get("facts", {}).items() if isinstance(value, int | float | str)}
    shown = {"purpose": purpose, "method": " · ".join(_methods(facts.get("settings", {}))) or None, **cost}
    evaluation = _json(store, f"{prefix}{EVALUATION_FILE}") or {}
    measures = [{"measure": measure, **values} for measure, values in evaluation.get("measures", {}).items()]
    captions = _table(store, f"{prefix}{CAPTIONS_FILE}")
    rows = captions.to_pylist() if captions is not None else []
    return EditPage(
        name,
        {key: value for key, value in shown.items() if value is not None},
        [_measure(row) for row in measures if row.get("n")],
        _verdict(measures),
        _chosen(rows),
        _changed(store, f"{prefix}{ROWS_FILE}", facts.get("rows"), names),
        evaluation.get("data"),
    )


def _methods(settings: dict[str, Any]) -> list[str]:
    """Return the methods by which an edit, or each edit in a sum, was made."""
    parts = [_methods(part) for part in settings.get("sum", [])]
    return list(dict.fromkeys([*chain(*parts), *(request["method"] for request in settings.get("wishes", []))]))


def _from_tables(store: Store) -> list[EditPage]:
    """Return the edits in the tables of a pipeline's run; none if it has no such tables."""
    tables = {}
    for name in ("edits", "evaluations", "edit_captions"):
        try:
            tables[name] = read_table(store, name).to_pylist()
        except FileNotFoundError:
            tables[name] = []
    found = []
    for facts in tables["edits"]:
        name = str(facts.pop("edit"))
        rows = [row for row in tables["evaluations"] if row["edit"] == name]
        measures = [_measure(row) for row in rows if row.get("n")]
        captions = [row for row in tables["edit_captions"] if row["edit"] == name]
        shown = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
        found.append(EditPage(name, shown, measures, _verdict(rows), _chosen(captions)))
    return found


def _purpose(purpose: Mapping[str, Any]) -> str:
    if purpose.get("source") and purpose.get("target"):
        return f"{purpose['source']} → {purpose['target']}"
    return f"{purpose.get('kind', 'edit')} {purpose.get('source') or ''}".strip()


def _verdict(measures: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not measures:
        return None
    # Computed again: evaluations of earlier versions, and the tables of pipelines, have none.
    found = verdict({row["measure"]: row.get("after") for row in measures})
    counts = {row["measure"]: row.get("n") for row in measures}
    bounds = [row | {"label": label_of(row["measure"]), "n": counts.get(row["measure"])} for row in found["bounds"]]
    return found | {"bounds": bounds}


def _measure(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: number(row.get(key)) for key in ("before", "after", "low", "high")}
    name = row["measure"]
    names = {"measure": name, "label": label_of(name), "column": COMPARED.index(name) if name in COMPARED else None}
    return numbers | names | {"n": row["n"], "protocol": row.get("protocol") or ""}


def _chosen(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the captions to show, one per image: changed ones first, and of these the ones that should change."""

    def order(row: Mapping[str, Any]) -> tuple[bool, int, str]:
        return row["before"] == row["after"], ROLE_ORDER.get(str(row.get("role")), 2), row["sample_id"]

    images = {row["sample_id"]: image_key(row["sample_id"], row.get("image")) for row in rows}
    by_name = {row["sample_id"]: row for row in sorted(rows, key=order)}
    chosen = [by_name[name] for name in one_per_image(by_name, images)[:SHOWN]]
    return [
        {"id": row["sample_id"], "before": row["before"], "after": row["after"], "role": row.get("role")}
        for row in chosen
    ]


def _changed(store: Store, key: str, checksum: dict[str, Any] | None, names: NeuronNames) -> dict[str, Any]:
    """Return how many rows the edit changes per layer, and the neurons that it changes most.

    `checksum` is the file's entry in edit.json; edits of earlier versions have none.
    """
    try:
        data = store.read(key)
        if checksum is not None:
            Checksum(**checksum).check(data)
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
        "strongest": [
            {"neuron": names.name(layers[at], units[at]), "norm": number(float(sizes[at]))} for at in strongest
        ],
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
