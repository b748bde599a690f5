"""Edits of a run as jobs of one unit each: RUN/edits/NAME, an edit like any other.

RUN/edits/NAME/editing/FINGERPRINT/    the receipt of the edit, and attempts at it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from mmray.engine import (
    Job,
    JobSettings,
    Output,
    Parts,
    Plan,
    Unit,
    UnitRefusedError,
    UnitResult,
    Worker,
    execution,
    known_by_digest,
)
from mmray.errors import InputError, StorageError
from mmray.features.editing.dataset import EditDataset, open_edit_dataset
from mmray.features.editing.edit import check_free
from mmray.features.editing.methods import make_edit
from mmray.features.editing.settings import EditSettings
from mmray.runs.run import open_run


class NamedEditSettings(JobSettings):
    """An edit that a run keeps under a name."""

    run: str = known_by_digest()
    """Folder of the run."""
    name: str = execution()
    """Name of the edit, and of its folder."""
    wish: EditSettings
    """What the edit is for, and how it is made."""


class EditJob(Job[NamedEditSettings, None]):
    """Makes one edit of a run. Edits that are made together share the model and what it says of the run's samples."""

    name = "editing"
    unit_noun = "edits"
    parts: ClassVar[dict[str, pa.Schema]] = {}

    @property
    def target(self) -> str:
        """The edit."""
        return edit_folder(self.settings.run, self.settings.name)

    def plan(self) -> Plan[None]:
        """Check that the run knows the edit's concepts, and that no other edit has the name."""
        name, wish = self.settings.name, self.settings.wish
        if not name or set(name) & set("/\\"):
            raise InputError(f"edit {name!r}: give it a name without slashes, the folder that it gets")
        run = open_run(self.settings.run)
        for concept in filter(None, (wish.source, wish.suppress)):
            run.rank(concept, 1)
        check_free(self.target, [wish])
        return Plan([Unit(1)], run.digests(), None)

    def worker(self, context: None) -> Worker:
        """Return what makes the edit."""
        return self.workers([self], [context])[0]

    @classmethod
    def workers(cls, jobs: Sequence[Job[NamedEditSettings, None]], contexts: Sequence[None]) -> list[Worker]:
        """Return what makes the edits, on material that is opened once."""
        run = open_run(jobs[0].settings.run)
        opened: dict[tuple[str, str | None], EditDataset] = {}

        def worker(job: Job[NamedEditSettings, None]) -> Worker:
            wish = job.settings.wish
            key = (wish.language, wish.prompt)

            def make(_: Unit) -> UnitResult:
                if key not in opened:
                    opened[key] = open_edit_dataset(run, wish)
                material = opened[key]
                try:
                    edit = make_edit(material, [wish])
                except StorageError:
                    raise
                except InputError as error:
                    # The others may be made: what is wrong is wrong with this one.
                    raise UnitRefusedError(str(error)) from error
                finally:
                    # What was kept while captions were written serves one edit; of many it would fill the memory.
                    material.heard.clear()
                edit.save(job.target)
                return UnitResult({})

            return make

        return [worker(job) for job in jobs]

    def merge(self, plan: Plan[None], parts: Parts, output: Output) -> dict[str, Any]:
        """Write nothing: an edit is written where it is made, edit.json last."""
        return {"edit": self.target}


def edit_folder(run: str, name: str) -> str:
    """Return where an edit of a run lies."""
    return f"{run.rstrip('/')}/edits/{name}"
