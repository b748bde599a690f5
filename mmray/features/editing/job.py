"""The job that makes an edit of a run in RUN/edits/NAME. It has one unit.

RUN/edits/NAME/editing/FINGERPRINT/    the edit's receipt, and the attempts at it
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
from mmray.features.editing.dataset import EditDataset, check_images, open_edit_dataset
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
    # Part of the fingerprint: another name would make finished edits start again.
    wish: EditSettings
    """What the edit is for, and how it is made."""


class EditJob(Job[NamedEditSettings, None]):
    """Makes one edit of a run. Edits made together share the model and its captions of the run's samples."""

    name = "editing"
    unit_noun = "edits"
    parts: ClassVar[dict[str, pa.Schema]] = {}

    @property
    def target(self) -> str:
        """The edit's folder."""
        return edit_folder(self.settings.run, self.settings.name)

    def plan(self) -> Plan[None]:
        """Check that the run knows the edit's concepts, and that no other edit has the name."""
        name, request = self.settings.name, self.settings.wish
        if not name or set(name) & set("/\\"):
            raise InputError(f"edit {name!r}: give it a name without slashes; its folder is called so")
        run = open_run(self.settings.run)
        # Fail here, before a worker loads the model.
        check_images(run, request)
        for concept in filter(None, (request.source, request.suppress)):
            run.rank(concept, 1)
        check_free(self.target, [request])
        return Plan([Unit(1)], run.digests(), None)

    def worker(self, context: None) -> Worker:
        """Return the function that makes the edit."""
        return self.workers([self], [context])[0]

    @classmethod
    def workers(cls, jobs: Sequence[Job[NamedEditSettings, None]], contexts: Sequence[None]) -> list[Worker]:
        """Return the functions that make the edits; those of one language and prompt share a dataset, all the model."""
        run = open_run(jobs[0].settings.run)
        datasets: dict[tuple[str, str | None], EditDataset] = {}

        def worker(job: Job[NamedEditSettings, None]) -> Worker:
            request = job.settings.wish
            key = (request.language, request.prompt)

            def make(_: Unit) -> UnitResult:
                if key not in datasets:
                    # They differ in what is asked; the model is one.
                    loaded = next((dataset.model for dataset in datasets.values()), None)
                    datasets[key] = open_edit_dataset(run, request, loaded)
                dataset = datasets[key]
                try:
                    edit = make_edit(dataset, [request])
                except StorageError:
                    # An InputError too, but a retry may get past it.
                    raise
                except InputError as error:
                    # Only this edit is wrong; the others can still be made.
                    raise UnitRefusedError(str(error)) from error
                finally:
                    # Caches serve one edit; kept for many, they would fill the memory.
                    dataset.caches.clear()
                edit.save(job.target)
                return UnitResult({})

            return make

        return [worker(job) for job in jobs]

    def merge(self, plan: Plan[None], parts: Parts, output: Output) -> dict[str, Any]:
        """Write nothing: the worker has saved the edit."""
        return {"edit": self.target}


def edit_folder(run: str, name: str) -> str:
    """Return the folder of a run's edit."""
    return f"{run.rstrip('/')}/edits/{name}"
