"""Edit records by each method, and measure them: one record with every edit undone, or a chain of edits that stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any

import pyarrow as pa

from mmray.data.images import LARGEST_FILE
from mmray.data.samples import image_digest
from mmray.errors import InputError, StorageError
from mmray.features.editing.edit_methods import EDIT_METHODS
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.mmedit import IMAGES, NAME, Records, measure_records
from mmray.features.evaluation.queries import Edit, Query
from mmray.features.mmedit.editors import EDITORS
from mmray.features.mmedit.in_context import FactInContext
from mmray.features.mmedit.record_edits import PreparedRecord, RecordTask, Session, prepare_record
from mmray.features.mmedit.tables import PARTS
from mmray.models.loading import LoadedModel
from mmray.storage import open_store

Record = tuple[int, dict[str, Any]]
"""A record with its number in the file."""


@dataclass(frozen=True, eq=False)
class Unchanged:
    """The edit of a record whose target the model answers already."""

    facts: dict[str, Any] = field(default_factory=lambda: {"parameters_changed": 0, "norm": 0.0, "seconds": 0.0})
    purposes: tuple[Any, ...] = ()

    @contextmanager
    def applied(self, _: LoadedModel) -> Iterator[None]:
        """Change nothing."""
        yield


@dataclass(frozen=True, eq=False)
class Chain:
    """Edits of one method that stay, one made after the other."""

    edits: tuple[Edit, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    purposes: tuple[Any, ...] = ()

    @contextmanager
    def applied(self, model: LoadedModel) -> Iterator[None]:
        """Apply them in order inside the block."""
        with ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.applied(model))
            yield

    def asked(self, query: Query) -> Query:
        """Return the query with all facts that stand in context."""
        facts = [edit for edit in self.edits if isinstance(edit, FactInContext)]
        if not facts:
            return query
        # One prompt with all facts: each fact's own `asked` would wrap the question of the one before.
        return replace(facts[0], statement="".join(edit.statement for edit in facts)).asked(query)


class Outcomes:
    """The parts of one unit."""

    def __init__(self, session: Session, task: str) -> None:
        self.session = session
        self.task = task
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}

    def measured(self, method: str, edits: int, rows: MeasurementBuffer, image: str) -> None:
        """Add the measurements of one record."""
        what = {"task": self.task, "method": method, "edits": edits}
        self.rows["outcomes"] += [row | what | {"image": image} for row in rows.measurements]
        for error in rows.errors:
            # A record's image that can't be read is the same failure for every method.
            if error not in self.rows["errors"]:
                self.rows["errors"].append(error)

    def made(self, method: str, number: int, edits: int, prepared: PreparedRecord, edit: Edit) -> None:
        """Add an edit."""
        record = prepared.record
        self.rows["mmedit_edits"].append(
            {"task": self.task, "method": method, "edits": edits, "record": number, "prompt": record.question}
            | {"reply": self.session.dataset.text(prepared.own), "target": record.target}
            | {"parameters": edit.facts["parameters_changed"], "norm": edit.facts["norm"]}
        )

    def failed(self, number: int, method: str, problem: str) -> None:
        """Add a failure to edit."""
        self.rows["errors"].append(
            {"sample_id": f"{NAME}{number}", "source": f"{self.task}, {method}", "stage": "edit"}
            | {"message": " ".join(problem.split())[:500]}
        )

    def tables(self) -> dict[str, pa.Table]:
        """Return the parts."""
        return {name: pa.Table.from_pylist(self.rows[name], schema=PARTS[name]) for name in PARTS}


class Benchmark:
    """Edits and measures records of one model."""

    def __init__(self, session: Session, baseline: BaselineReplies) -> None:
        self.session = session
        self.baseline = baseline

    def single(self, task: str, records: Records, methods: Sequence[str]) -> Outcomes:
        """Edit one record by each method; every edit is undone before the next."""
        ((number, record),) = records.records
        # Replies are kept by record, so those of the record before would only fill the memory.
        self.baseline.clear()
        outcomes = Outcomes(self.session, task)
        read = self._read(outcomes, records.folder, number, record, ", ".join(methods))
        if read is None:
            return outcomes
        prepared = prepare_record(self.session, read)
        for method in methods:
            edit = self.edit(outcomes, number, prepared, method)
            if edit is not None:
                outcomes.made(method, number, 1, prepared, edit)
                outcomes.measured(method, 1, measure_records(self.baseline, edit, records), record["image"])
        return outcomes

    def chain(self, task: str, records: Records, method: str, every: int) -> Outcomes:
        """Edit records one after the other, with earlier edits in place, and measure all so far after every N-th."""
        self.baseline.clear()
        outcomes, edits, done = Outcomes(self.session, task), list[Edit](), list[Record]()
        for number, record in records.records:
            read = self._read(outcomes, records.folder, number, record, method)
            if read is None:
                continue
            if method in EDIT_METHODS:
                # What must stay is what the unedited model says.
                self.session.asked(read.question)
            # A record is edited on the model that the earlier edits have left behind.
            with Chain(tuple(edits)).applied(self.session.model):
                prepared = prepare_record(self.session, read, edited=bool(edits))
                edit = self.edit(outcomes, number, prepared, method)
            if edit is None:
                continue
            edits.append(edit)
            done.append((number, record))
            outcomes.made(method, number, len(edits), prepared, edit)
            if len(edits) % every == 0:
                for one in done:
                    rows = measure_records(self.baseline, Chain(tuple(edits)), replace(records, records=(one,)))
                    outcomes.measured(method, len(edits), rows, one[1]["image"])
        return outcomes

    def _read(
        self, outcomes: Outcomes, folder: str, number: int, record: dict[str, Any], methods: str
    ) -> RecordTask | None:
        """Return what an edit needs of a record; None if its image can't be read, which is a failure."""
        store, contents = open_store(folder), dict[str, bytes]()
        for name in {str(record[image]) for image in IMAGES if record.get(image)}:
            try:
                contents[name] = store.read_at_most(name, LARGEST_FILE)
            except (OSError, ValueError) as error:
                # Other images are reported when they are measured.
                if name == record["image"]:
                    outcomes.failed(number, methods, f"{name}: {error}")
                    return None
        others = frozenset(digest for one in contents.values() if (digest := image_digest(one)) is not None)
        return RecordTask(
            f"{outcomes.task} {number}", record["src"], record["alt"].strip(), contents[record["image"]], others
        )

    def edit(self, outcomes: Outcomes, number: int, prepared: PreparedRecord, method: str) -> Edit | None:
        """Return the edit of a record by a method; None if it can't be made, which is a failure."""
        if prepared.answered:
            return Unchanged()
        try:
            edit: Edit = resolve_name(EDITORS[method].function)(self.session, prepared, method)
        except StorageError:
            # An InputError too, but a retry may get past it.
            raise
        except InputError as error:
            outcomes.failed(number, method, str(error))
            return None
        return edit
