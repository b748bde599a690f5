"""The whole chain as one call: census → further analyses → edits, one actor each → evaluations → tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.engine import JobResult, JobSettings, Progress, executor_for, run_together
from mmray.engine.settings import first_problem
from mmray.errors import DamagedError, InputError
from mmray.features.census.job import CensusResult, run_census
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.editing.edit import WeightEdit, open_edit
from mmray.features.editing.files import CAPTIONS_FILE
from mmray.features.editing.job import EditJob, NamedEditSettings, edit_folder
from mmray.features.editing.settings import edit_settings
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.settings import EvaluationSettings, evaluation_settings
from mmray.features.pipeline.steps import StepResult, checked_steps, run_steps
from mmray.features.pipeline.tables import TABLES
from mmray.runs.card import publish
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.runs.receipts import receipts_digest
from mmray.runs.run import Run, open_run
from mmray.runs.snapshots import Snapshot, SnapshotWriter, newest, next_fence
from mmray.runs.tables import read_file, read_table
from mmray.storage import Store, open_store

Follow = Callable[[str, Progress], None]
"""Called with the name of the step and its progress."""

logger = logging.getLogger(__name__)


SHORT = ("model", "data", "out")
"""Settings of the census that may stand at the top of a pipeline's file, and in short overrides."""


class PipelineSettings(BaseModel):
    """Contents of a pipeline's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    census: dict[str, Any]
    """Settings of `mmray census`."""
    steps: list[dict[str, dict[str, Any] | None]] = Field(default_factory=list)
    """Analyses of the run in this order, each a command's name with its settings; neighbours run side by side."""
    edits: dict[str, dict[str, Any]] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    detector: str | None = None
    """Detector of every step that queries one; default: the step's own."""
    alignment: str | None = None
    """Folder of the network from the detector's embedding to the model's image tokens, for the same steps."""
    local: bool = False
    """Run every step in this process, without Ray."""

    @property
    def detecting(self) -> dict[str, str]:
        """The settings of a step that queries a detector."""
        given = {"detector": self.detector, "alignment": self.alignment}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Pipeline:
    """A finished pipeline."""

    run: Run
    census: CensusResult
    steps: dict[str, StepResult] = field(default_factory=dict)
    """By title: the name of the analysis, with a number if it is not the first of its kind."""
    edits: dict[str, WeightEdit] = field(default_factory=dict)
    evaluations: dict[str, JobResult] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    """Edits that could not be made, and why."""

    @property
    def complete(self) -> bool:
        """Whether nothing failed or was quarantined."""
        analysed = all(step.complete for step in self.steps.values())
        evaluated = all(evaluation.complete for evaluation in self.evaluations.values())
        return self.census.complete and analysed and not self.quarantined and evaluated

    @property
    def measures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The measures of each evaluated edit."""
        return {name: evaluation.headline["measures"] for name, evaluation in self.evaluations.items()}


def pipeline_settings(values: Mapping[str, Any]) -> PipelineSettings:
    """Return validated settings, those of every step included.

    Raises InputError that names the first wrong setting and its place in the file.
    """
    given = {name: value for name, value in values.items() if name not in SHORT}
    short = {name: values[name] for name in SHORT if name in values}
    if short and isinstance(census := given.get("census", {}), Mapping):
        given["census"] = {**census, **short}
    try:
        settings = PipelineSettings(**given)
    except ValidationError as error:
        raise InputError(
            f"{first_problem(error)}; a pipeline has census, steps, edits (name: settings), evaluation, detector, "
            "alignment and local"
        ) from error
    # Every step is validated before the first one starts.
    _census(settings)
    checked_steps(settings.steps, _execution(settings) | {"run": "RUN"}, settings.detecting)
    for name, edit in settings.edits.items():
        try:
            edit_settings(edit)
        except InputError as error:
            raise InputError(f"edits, {name}: {error}") from error
    if settings.edits:
        # The run and the edits don't exist yet; any name will do to validate the other settings.
        _evaluation(settings, "RUN", "EDIT")
    return settings


def run_pipeline(settings: PipelineSettings, follow: Follow = lambda _, __: None) -> Pipeline:
    """Run a pipeline, or resume one that stopped; finished work of any step is not repeated.

    Raises InputError for anything wrong with the set-up.
    """
    # One session for all steps, so that Ray starts once.
    with executor_for(JobSettings(**_execution(settings))).session():
        census = _census(settings)
        outcome = run_census(census, partial(follow, "census"))
        done = Pipeline(open_run(census.out), outcome)
        common = _execution(settings) | {"run": done.run.uri}
        done.steps = run_steps(checked_steps(settings.steps, common, settings.detecting), follow)
        if settings.edits:
            with drive_analysis(f"{done.run.uri}/pipeline") as lease:
                done.run.folder.prepare()
                store = lease.guard(done.run.folder.store)
                # The fence orders snapshots, so that a driver that lost its lease cannot replace newer tables.
                fence = next_fence(store, "pipeline", lease.number)
                made_from = _edit(done, settings, follow, lease)
                _write(done, list(settings.edits), made_from, SnapshotWriter(store, "pipeline", fence))
    return done


def _edit(done: Pipeline, settings: PipelineSettings, follow: Follow, lease: Lease) -> dict[str, str]:
    """Make the edits, and evaluate those that succeed.

    Returns folder below the run's → digest of the receipts there, from which the tables are made.
    """
    run, shared = done.run.uri, _execution(settings)
    results: list[JobResult] = []
    jobs = [
        EditJob(NamedEditSettings(run=run, name=name, wish=edit_settings(edit), **shared))
        for name, edit in settings.edits.items()
    ]
    for job, made in zip(jobs, run_together(jobs, follow=partial(follow, "edits"), lease=lease), strict=True):
        name = job.settings.name
        # One edit that fails must not keep the others from being made and evaluated.
        # An edit is one unit, number 0.
        if made.quarantined:
            done.quarantined[name] = made.quarantined[0]
        else:
            done.edits[name] = open_edit(job.target)
            results.append(made)
    if done.edits:
        evaluations = [EvaluationJob(_evaluation(settings, run, edit_folder(run, name))) for name in done.edits]
        evaluated = run_together(evaluations, follow=partial(follow, "evaluations"))
        done.evaluations = dict(zip(done.edits, evaluated, strict=True))
        results += evaluated
    return {
        result.parts.folder.store.uri.removeprefix(f"{run}/"): receipts_digest(result.parts.receipts)
        for result in results
    }


def _census(settings: PipelineSettings) -> CensusSettings:
    return census_settings(settings.census | ({"local": True} if settings.local else {}))


def _execution(settings: PipelineSettings) -> dict[str, Any]:
    """Return execution settings for the steps after the census: the census's, and whether the pipeline is local."""
    census = _census(settings)
    names = ("workers", "gpus_per_worker", "address", "retry_failed")
    return {name: getattr(census, name) for name in names} | {"local": settings.local}


def _evaluation(settings: PipelineSettings, run: str, edit: str) -> EvaluationSettings:
    try:
        # By default on the census's data; the file's own settings come after it, and win.
        shared = _execution(settings) | {"data": _census(settings).data}
        return evaluation_settings({**shared, **settings.evaluation, "run": run, "edit": edit})
    except InputError as error:
        raise InputError(f"evaluation: {error}") from error


def _write(done: Pipeline, made: Sequence[str], made_from: Mapping[str, str], writer: SnapshotWriter) -> None:
    """Write the tables of the run's edits, all at once. Rows of other edits, which earlier calls made, stay."""
    new = {"edits": _edit_rows(done), "evaluations": _measure_rows(done), "edit_captions": _caption_rows(done)}
    snapshot = newest(writer.store, "pipeline")
    before = _earlier_tables(writer.store, snapshot)
    tables = {name: _replaced(name, before[name], made, rows) for name, rows in new.items()}
    # Rows of other edits stay in the tables, so what these were made from stays, too.
    made_from = {**_of_others(snapshot.made_from, made), **made_from} if snapshot else made_from
    # A second call that changes nothing writes nothing.
    same = all(before[name] is not None and table.equals(before[name]) for name, table in tables.items())
    if same and snapshot and snapshot.made_from == made_from:
        return
    for name, table in tables.items():
        writer.add(name, table)
    publish(writer.store, writer.commit(made_from, {}))


def _of_others(made_from: Mapping[str, str], made: Sequence[str]) -> dict[str, str]:
    """Return the entries for edits other than those made now; folders are edits/NAME/…"""
    return {folder: digest for folder, digest in made_from.items() if folder.split("/")[1] not in made}


def _earlier_tables(store: Store, snapshot: Snapshot | None) -> dict[str, pa.Table | None]:
    """Return the tables of earlier calls; None if there is none, or it is damaged."""
    found: dict[str, pa.Table | None] = dict.fromkeys(TABLES)
    for name in TABLES:
        try:
            found[name] = snapshot.read(store, name) if snapshot else read_table(store, name)
        except FileNotFoundError:
            continue
        except DamagedError as error:
            logger.warning("%s (rows of edits that this pipeline does not name are lost)", error)
    return found


def _replaced(name: str, before: pa.Table | None, made: Sequence[str], rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Return a table with the rows of the edits made now replaced."""
    schema = TABLES[name]
    parts = [schema.empty_table()]
    if before is not None:
        parts.append(before.filter(pc.invert(pc.is_in(before["edit"], pa.array(made, pa.string())))))
    # A table of an earlier version may lack a newer column.
    return pa.concat_tables(
        [*parts, pa.Table.from_pylist(list(rows), schema=schema)], promote_options="default"
    ).combine_chunks()


def _edit_rows(done: Pipeline) -> Iterator[dict[str, Any]]:
    for name, edit in done.edits.items():
        purpose, request = edit.purpose, edit.settings["wishes"][0]
        yield {
            "edit": name,
            "kind": purpose.kind,
            "source": purpose.source,
            "target": purpose.target,
            "pairs": [{"context": context, "word": word} for context, word in purpose.pairs],
            "method": request["method"],
            **{key: edit.facts[key] for key in ("rows_changed", "parameters_changed", "norm", "seconds")},
        }


def _measure_rows(done: Pipeline) -> Iterator[dict[str, Any]]:
    for name, measures in done.measures.items():
        for measure, row in measures.items():
            yield {"edit": name, "measure": measure, **row}


def _caption_rows(done: Pipeline) -> Iterator[dict[str, Any]]:
    for name in done.evaluations:
        rows = read_file(open_store(edit_folder(done.run.uri, name)), CAPTIONS_FILE)
        yield from ({"edit": name, **row} for row in rows.to_pylist())
