"""The report's page of MMEdit: the paper's table, for each task and protocol."""

from __future__ import annotations

from typing import Any

from mmray.features.mmedit.editors import EDITORS, LEFT_OUT
from mmray.features.mmedit.summary import BEYOND, FIVE, HARMONIC, PROTOCOLS
from mmray.features.mmedit.view import SHORT
from mmray.report.concepts import number
from mmray.report.section import Request, Section


def section(request: Request) -> Section:
    """Return the tables by task and protocol; none for a run without them."""
    found = request.run.optional("mmedit")
    rows = found.to_pylist() if found is not None else []
    tables = [
        {"task": task, "protocol": name, "definition": protocol.definition, "rows": _rows(rows, task, name)}
        for task in dict.fromkeys(row["task"] for row in rows)
        for name, protocol in PROTOCOLS.items()
    ]
    page: dict[str, Any] = {
        "tables": [table for table in tables if table["rows"]],
        "columns": [{"measure": name, "title": SHORT[name]} for name in (*FIVE, HARMONIC, *BEYOND)],
        "methods": {name: editor.definition for name, editor in EDITORS.items()},
        "left_out": LEFT_OUT,
    }
    return Section(page)


def _rows(rows: list[dict[str, Any]], task: str, protocol: str) -> list[dict[str, Any]]:
    """Return one row per method and number of edits in place, with each measure and its interval."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if (row["task"], row["protocol"]) == (task, protocol):
            method = found.setdefault((row["method"], row["edits"]), {"method": row["method"], "edits": row["edits"]})
            method["n"] = max(method.get("n", 0), row["n"])
            method[row["measure"]] = {name: number(row[name]) for name in ("before", "value", "low", "high")}
    return list(found.values())
