"""The whole chain as one job: census → edits, an actor each → an evaluation of each edit → tables of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.cluster.census import Outcome, run_census
from mmray.cluster.editing import edit_folder, make_edits
from mmray.cluster.evaluation import Evaluation, run_evaluations
from mmray.derived import TABLES
from mmray.editing.edit import WeightEdit, open_edit
from mmray.editing.settings import edit_settings
from mmray.engine import Progress
from mmray.engine.session import ray_session
from mmray.errors import InputError
from mmray.evaluation.settings import evaluation_settings
from mmray.results.run import Run, open_run
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.settings import census_settings, first_problem
from mmray.storage import open_store
from mmray.tables import CAPTIONS_FILE, read_file
from mmray.writing import write_table

Follow = Callable[[str, Progress], None]
"""Told of progress, with the name of the step."""


class PipelineSettings(BaseModel):
    """What a pipeline's file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    census: dict[str, Any]
    edits: dict[str, dict[str, Any]] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


@dataclass
class Pipeline:
    """What a finished pipeline amounts to."""

    run: Run
    census: Outcome
    edits: dict[str, WeightEdit] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)
    """Edits that could not be made, and why."""

    @property
    def complete(self) -> bool:
        """Tell whether all went well."""
        evaluated = all(evaluation.complete for evaluation in self.evaluations.values())
        return self.census.complete and not self.aside and evaluated


def pipeline_settings(values: Mapping[str, Any]) -> PipelineSettings:
    """Return checked settings, those of every step too; raises InputError naming the first that is wrong, and where."""
    try:
        settings = PipelineSettings(**values)
    except ValidationError as error:
        raise InputError(
            f"{first_problem(error)}; a pipeline has census, edits (name: settings) and evaluation"
        ) from error
    census_settings(settings.census)
    for name, wanted in settings.edits.items():
        try:
            edit_settings(wanted)
        except InputError as error:
            raise InputError(f"edits, {name}: {error}") from error
    if settings.edits:
        _evaluation(settings, "RUN", "EDIT")
    return settings


def run_pipeline(settings: PipelineSettings, follow: Follow = lambda _, __: None) -> Pipeline:
    """Run a pipeline to its end, or go on where one stopped: what is done of any step is not done again.

    Raises InputError for anything wrong with the set-up.
    """
    census = census_settings(settings.census)
    with ray_session(census.address):
        outcome = run_census(census, partial(follow, "census"))
        done = Pipeline(open_run(census.out, patient=True), outcome)
        if settings.edits:
            with drive_analysis(f"{done.run.uri}/edits") as lease:
                _edit(done, settings, follow, lease)
    return done


def _edit(done: Pipeline, settings: PipelineSettings, follow: Follow, lease: Lease) -> None:
    run, census = done.run, census_settings(settings.census)
    done.aside = make_edits(
        run,
        {name: edit_settings(wanted) for name, wanted in settings.edits.items()},
        lease,
        partial(follow, "edits"),
        gpus_per_worker=census.gpus_per_worker,
        address=census.address,
        retry_failed=census.retry_failed,
    )
    done.edits = {name: open_edit(edit_folder(run, name)) for name in settings.edits if name not in done.aside}
    if done.edits:
        wanted = [_evaluation(settings, run.uri, edit_folder(run, name)) for name in done.edits]
        found = run_evaluations(wanted, partial(follow, "evaluations"))
        done.evaluations = dict(zip(done.edits, found, strict=True))
    store = lease.guard(run.folder.store)
    write_table(store, "edits", [_table("edits", (_facts(name, done.edits[name]) for name in done.edits))])
    write_table(store, "evaluations", [_table("evaluations", _measures(done))])
    write_table(store, "edit_captions", [_table("edit_captions", _captions(done))])


def _evaluation(settings: PipelineSettings, run: str, edit: str) -> Any:
    census = census_settings(settings.census)
    shared = {"gpus_per_worker": census.gpus_per_worker, "address": census.address, "retry_failed": census.retry_failed}
    try:
        return evaluation_settings({**shared, **settings.evaluation, "run": run, "edit": edit})
    except InputError as error:
        raise InputError(f"evaluation: {error}") from error


def _table(name: str, rows: Iterator[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=TABLES[name])


def _facts(name: str, edit: WeightEdit) -> dict[str, Any]:
    purpose, wish = edit.purpose, edit.settings["wishes"][0]
    return {
        "edit": name,
        "kind": purpose.kind,
        "source": purpose.source,
        "target": purpose.target,
        "pairs": [{"context": context, "word": word} for context, word in purpose.pairs],
        "method": wish["method"],
        **{key: edit.facts[key] for key in ("rows_changed", "parameters_changed", "norm", "seconds")},
    }


def _measures(done: Pipeline) -> Iterator[dict[str, Any]]:
    for name, evaluation in done.evaluations.items():
        for measure, row in evaluation.measures.items():
            yield {"edit": name, "measure": measure, **row}


def _captions(done: Pipeline) -> Iterator[dict[str, Any]]:
    for name in done.evaluations:
        rows = read_file(open_store(edit_folder(done.run, name)), CAPTIONS_FILE)
        yield from ({"edit": name, **row} for row in rows.to_pylist())
