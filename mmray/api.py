"""Whole jobs as one call from Python."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmray.detector.alignment_settings import alignment_settings
from mmray.engine import run as run_job
from mmray.errors import InputError
from mmray.features.alignment.job import run_alignment
from mmray.features.census.job import run_census as drive_census
from mmray.features.census.settings import census_settings
from mmray.features.editing.edit import WeightEdit
from mmray.features.editing.methods import edit_run
from mmray.features.editing.settings import edit_settings
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.settings import evaluation_settings
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.perturb_job import PerturbJob
from mmray.features.hallucination.settings import hallucination_settings, perturbation_settings
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.settings import saliency_settings
from mmray.features.select.job import Selection, SelectionJob, selections
from mmray.features.select.settings import selection_settings
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import selectivity_settings
from mmray.runs.run import Run, open_run

EXECUTORS = ("ray", "local")
"""Where a job may run: on Ray's actors, or in this process."""


def _asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as given from Python, where `executor="local"` asks for this process."""
    given = dict(settings)
    executor = given.pop("executor", "ray")
    if executor not in EXECUTORS:
        raise InputError(f"unknown executor {executor!r}; choose from {', '.join(EXECUTORS)}")
    return given | ({"local": True} if executor == "local" else {})


def edit(run: Run | str, **settings: Any) -> WeightEdit:
    """Edit the neurons that a run located for a concept, on the run's model and data; `applied`, `save` and `+` use it.

    `settings` are those of `mmray edit`, with underscores: `source` and `target`, or `suppress`, or
    `reduce_hallucination=True`. Raises InputError for bad settings, a concept that the run does not know or the model
    never says.
    """
    return edit_run(run if isinstance(run, Run) else open_run(run), edit_settings(settings))


def evaluate(run: Run | str, edit: str, data: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Evaluate an edit's folder on data, or resume an evaluation that stopped, and return its measures.

    They are those of `EDIT/evaluation.json`: measure → before, after, low, high, n, protocol. `settings` are those of
    `mmray evaluate`, with underscores. (`mmray.features.evaluation.evaluate.evaluate` does the same to a loaded model
    and samples in this process.) Raises InputError for bad settings or input.
    """
    uri = run.uri if isinstance(run, Run) else str(run)
    asked = {"run": uri, "edit": str(edit), "data": data, **_asked(settings)}
    measures: dict[str, dict[str, Any]] = run_job(EvaluationJob(evaluation_settings(asked))).headline["measures"]
    return measures


def properties(run: Run | str, **settings: Any) -> pa.Table:
    """Measure what a run's neurons mean, or go on where that was stopped; returns the measures over all concepts.

    Those of single concepts and the heat maps are in the run's tables. `settings` are those of `mmray properties`, with
    underscores. Raises InputError for bad settings, or where model or data can't be had.
    """
    uri = run.uri if isinstance(run, Run) else str(run)
    run_job(PropertiesJob(property_settings({"run": uri, **_asked(settings)})))
    return open_run(uri).properties()


def saliency(run: Run | str, **settings: Any) -> pa.Table:
    """Measure saliency maps of a run's words against boxes, or resume; returns the measures.

    `settings` are those of `mmray saliency RUN`, with underscores. (`load_model(…).saliency(…)` is the map of one
    word.) Raises InputError for bad settings, or where the data has no boxes.
    """
    uri = run.uri if isinstance(run, Run) else str(run)
    run_job(SaliencyJob(saliency_settings({"run": uri, **_asked(settings)})))
    return open_run(uri).table("saliency")


def selectivity(run: Run | str, **settings: Any) -> dict[str, pa.Table]:
    """Choose the neurons of each label of a run and test them as asked; the rows by table, as the run keeps them.

    `settings` are those of `mmray selectivity`, with underscores. Raises InputError for bad settings or input.
    """
    uri = run.uri if isinstance(run, Run) else str(run)
    return run_selectivity(selectivity_settings({"run": uri, **_asked(settings)})).tables


def select_neurons(
    run: Run | str, concepts: Sequence[str], count: int = 50, samples: int = 400, **settings: Any
) -> list[Selection]:
    """Choose, for each concept, `count` of the neurons that the run ranks, so that its noun falls and others stay.

    The run's samples are gone through once more, `samples` of them, forward and backward for each noun: three or four
    times a census of as many. Best on a run of `--score effect`, whose `selective` ranking has the right candidates.
    `settings` are those of `mmray select`, with underscores. Raises InputError for an unknown concept, or where model
    or data are no longer what the run saw.
    """
    uri = run.uri if isinstance(run, Run) else str(run)
    asked = {"run": uri, "concepts": tuple(concepts), "k": count, "samples": samples, **_asked(settings)}
    return selections(run_job(SelectionJob(selection_settings(asked))), open_run(uri))


def align(**settings: Any) -> dict[str, dict[str, Any]]:
    """Train a network that makes a LLaVA's image tokens of another tower's embedding, or go on where that was stopped.

    `settings` are those of `mmray align`, with underscores. Returns the joint model's measures next to the original's.
    Raises InputError for bad settings or input.
    """
    return run_alignment(alignment_settings(_asked(settings))).measures


def hallucination(run: Run | str, **settings: Any) -> pa.Table:
    """Have a detector judge what a run's model claims, or go on where that was stopped; returns the measures.

    The claims and pictures of those that are wrong are in the run's tables. `settings` are those of
    `mmray hallucination`, with underscores. Raises InputError for bad settings or input.
    """
    uri = run.uri if isinstance(run, Run) else str(run)
    run_job(HallucinationJob(hallucination_settings({"run": uri, **_asked(settings)})))
    return open_run(uri).table("opinions")


def perturb(**settings: Any) -> list[dict[str, Any]]:
    """Move what a model sees from one concept to another, ask again, and return what changed, with controls.

    `settings` are those of `mmray perturb`, with underscores. Raises InputError for bad settings or input.
    """
    done = run_job(PerturbJob(perturbation_settings(_asked(settings))))
    measures: list[dict[str, Any]] = done.headline["measures"]
    return measures


def run_census(model: str, data: str, out: str, **settings: Any) -> Run:
    """Run a census to its end, or resume one that stopped, and open it.

    `settings` are those of `mmray census`, with underscores (`shard_size=500`); see
    `mmray.features.census.settings.CensusSettings`. Failed samples and shards are in the run's `errors` table and
    status. Warns of captions in whose language no nouns are found. Raises InputError for bad settings or input.
    """
    drive_census(
        census_settings({"model": model, "data": data, "out": str(out), **_asked(settings)}),
        warn=lambda line: warnings.warn(line, stacklevel=4),
    )
    return open_run(out)
