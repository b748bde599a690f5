"""Edits of a run, an actor each: RUN/edits/NAME.

RUN/edits/.making/FINGERPRINT/    receipts and attempts of the edits that were asked for together
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.units import UnitWorker, mapped
from mmray.editing.edit import check_free
from mmray.editing.material import Material, open_material
from mmray.editing.methods import make_edit
from mmray.editing.settings import EditSettings
from mmray.engine import Progress
from mmray.errors import InputError, StorageError
from mmray.results.run import Run, open_run
from mmray.runs import Receipt, RunFolder
from mmray.tables import SCHEMAS
from mmray.version import VERSION


def edit_folder(run: Run, name: str) -> str:
    """Return where an edit of a run lies."""
    return f"{run.uri}/edits/{name}"


def make_edits(
    run: Run,
    edits: Mapping[str, EditSettings],
    check: Callable[[], None],
    follow: Callable[[Progress], None] = lambda _: None,
    *,
    workers: str | None = None,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    retry_failed: bool = False,
) -> dict[str, str]:
    """Make edits of a run in parallel, or go on where that was stopped; return name → why, of those set aside.

    `check` raises where this driver is not to go on. Raises InputError, before any work, for a concept that the run
    does not know, or an edit of the same name that was made with other settings.
    """
    for name, settings in edits.items():
        _check(run, name, settings)
    folder, info = _folder(run, edits)
    folder.begin(info, json.dumps(sorted(edits)).encode())
    carry_out(
        folder,
        [1] * len(edits),
        lambda units: mapped(
            EditWorker,
            (run.uri, dict(edits), folder.store.uri),
            units,
            pool_for(workers, gpus_per_worker, len(units)),
            ahead=0,
        ),
        follow,
        check,
        address=address,
        retry_failed=retry_failed,
    )
    names = list(edits)
    return {names[unit]: reason for unit, reason in folder.reasons(folder.receipts()).items()}


class EditWorker(UnitWorker):
    """Loads the model once, and makes edits one by one; what it says of a sample is written once."""

    def __init__(self, run: str, edits: dict[str, EditSettings], folder: str, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.edits = list(edits.items())
        self.material: dict[tuple[str, str | None], Material] = {}
        self.folder = RunFolder.at(folder, patient=True)
        self.run = open_run(run, patient=True)

    def unit(self, unit: int) -> Receipt:
        """Make one edit."""
        return self.attempted(unit, 1, lambda: self.commit(unit))

    def commit(self, unit: int) -> Receipt:
        """Make an edit and write it; what tells of a whole one, edit.json, comes last."""
        began = time.perf_counter()
        name, settings = self.edits[unit]
        key = (settings.language, settings.prompt)
        if key not in self.material:
            self.material[key] = open_material(self.run, settings)
        material = self.material[key]
        try:
            edit = make_edit(material, [settings])
        except StorageError:
            raise
        except InputError as error:
            # The others may be made: what is wrong is wrong with this one.
            return self.folder.set_aside(unit, 1, str(error))
        finally:
            # What was held while captions were written serves one edit; of many it would fill the memory.
            material.heard.clear()
        edit.save(edit_folder(self.run, name))
        return self.folder.commit_shard(
            unit, {"errors": SCHEMAS["errors"].empty_table()}, 1, time.perf_counter() - began
        )


def _check(run: Run, name: str, settings: EditSettings) -> None:
    if not name or set(name) & set("/\\"):
        raise InputError(f"edit {name!r}: give it a name without slashes, the folder that it gets")
    for concept in filter(None, (settings.source, settings.suppress)):
        run.rank(concept, 1)
    check_free(edit_folder(run, name), [settings])


def _folder(run: Run, edits: Mapping[str, EditSettings]) -> tuple[RunFolder, dict[str, Any]]:
    """Return where receipts of these edits lie, and what that folder says of itself."""
    wanted = {name: settings.model_dump() for name, settings in edits.items()}
    digests = {"run": run.info["fingerprint"], "receipts": str((run.folder.finished() or {}).get("receipts"))}
    facts = json.dumps([wanted, digests], sort_keys=True)
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
    info = {
        "result_settings": wanted,
        "digests": digests,
        "fingerprint": fingerprint,
        "shards": len(edits),
        "versions": {"mmray": VERSION},
    }
    return RunFolder.at(f"{run.uri}/edits/.making/{fingerprint}", patient=True), info
