"""Whole jobs as functions: each runs or resumes a job and returns its results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pyarrow as pa

from mmray.engine import run as run_job
from mmray.engine.signatures import Executor, takes
from mmray.errors import InputError
from mmray.features.alignment.job import run_alignment
from mmray.features.alignment.settings import AlignmentSettings, alignment_settings
from mmray.features.census.job import run_census as drive_census
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.editing.edit import WeightEdit
from mmray.features.editing.methods import edit_run
from mmray.features.editing.settings import EditSettings, edit_settings
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.settings import EvaluationSettings, evaluation_settings
from mmray.features.hallucination.bias_job import BiasJob
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.perturb_job import PerturbJob
from mmray.features.hallucination.settings import (
    BiasSettings,
    HallucinationSettings,
    PerturbationSettings,
    bias_settings,
    hallucination_settings,
    perturbation_settings,
)
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import PropertySettings, property_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.settings import SaliencySettings, saliency_settings
from mmray.features.select.job import Selection, SelectionJob, selections
from mmray.features.select.settings import SelectionSettings, selection_settings
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import SelectivitySettings, selectivity_settings
from mmray.runs.run import Run, open_run


def _uri(run: Run | str) -> str:
    return run.uri if isinstance(run, Run) else str(run)


def _with_executor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return job settings in which `executor="local"` has become the setting `local`."""
    others = dict(settings)
    executor = others.pop("executor", "ray")
    if executor not in get_args(Executor):
        raise InputError(f"unknown executor {executor!r}; choose from {', '.join(get_args(Executor))}")
    return others | ({"local": True} if executor == "local" else {})


@takes(EditSettings)
def edit(run: Run | str, **settings: Any) -> WeightEdit:
    """Edit the neurons that a run located for a concept, and return the edit with its `applied`, `save` and `+`.

    Needs `source` and `target`, or `suppress`, or `reduce_hallucination=True`. Raises InputError for bad settings, and
    for a concept that is not in the run or that the model never generates.
    """
    return edit_run(run if isinstance(run, Run) else open_run(run), edit_settings(settings))


@takes(EvaluationSettings)
def evaluate(run: Run | str, edit: str | None, data: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Evaluate the edit in a folder on data, or resume its evaluation, and return the measures.

    With `edit=None`, the `decoding` is evaluated in its place.

    They are those of `EDIT/evaluation.json`: measure → before, after, low, high, n, protocol. Raises InputError
    for bad settings or input. To evaluate a loaded model and samples in this process, use
    `mmray.features.evaluation.evaluate.evaluate`.
    """
    subject = {} if edit is None else {"edit": str(edit)}
    values = {"run": _uri(run), **subject, "data": data, **_with_executor(settings)}
    measures: dict[str, dict[str, Any]] = run_job(EvaluationJob(evaluation_settings(values))).headline["measures"]
    return measures


@takes(PropertySettings)
def properties(run: Run | str, **settings: Any) -> pa.Table:
    """Measure properties of a run's neurons, or resume, and return the measures over all concepts.

    Measures per concept and heat maps are in the run's tables. Raises InputError for bad settings, or if model or
    data can't be loaded.
    """
    run_job(PropertiesJob(property_settings({"run": _uri(run), **_with_executor(settings)})))
    return open_run(_uri(run)).properties()


@takes(SaliencySettings)
def saliency(run: Run | str, **settings: Any) -> pa.Table:
    """Compare saliency maps of a run's words with ground-truth boxes, or resume, and return the measures.

    Raises InputError for bad settings, or if the data has no boxes. For the map of a single word, use
    `load_model(…).saliency(…)`.
    """
    run_job(SaliencyJob(saliency_settings({"run": _uri(run), **_with_executor(settings)})))
    return open_run(_uri(run)).table("saliency")


@takes(SelectivitySettings)
def selectivity(run: Run | str, **settings: Any) -> dict[str, pa.Table]:
    """Select the neurons of each label of a run, test them, and return the rows by table, as in the run.

    Raises InputError for bad settings or input.
    """
    return run_selectivity(selectivity_settings({"run": _uri(run), **_with_executor(settings)})).tables


@takes(SelectionSettings, "k")
def select(
    run: Run | str, concepts: Sequence[str], count: int = 50, samples: int = 400, **settings: Any
) -> list[Selection]:
    """Select jointly, for each concept, `count` ranked neurons whose ablation lowers its noun and keeps other nouns.

    Runs forward and backward passes for each noun of `samples` of the run's samples, at three or four times the cost
    of a census of them. Works best on a run with `--score effect`, whose `selective` ranking has the best candidates.
    Raises InputError for an unknown concept, or if model or data have changed since the run.
    """
    values = {"run": _uri(run), "concepts": tuple(concepts), "k": count, "samples": samples, **_with_executor(settings)}
    return selections(run_job(SelectionJob(selection_settings(values))), open_run(_uri(run)))


@takes(AlignmentSettings)
def align(**settings: Any) -> dict[str, dict[str, Any]]:
    """Train a network that maps another tower's embeddings to a LLaVA's image tokens, or resume the training.

    Returns the joint model's measures next to the original's. Raises InputError for bad settings or input.
    """
    return run_alignment(alignment_settings(_with_executor(settings))).measures


@takes(HallucinationSettings)
def hallucination(run: Run | str, **settings: Any) -> pa.Table:
    """Check a run's generated claims with a detector, or resume, and return the measures.

    The claims, and pictures of wrong ones, are in the run's tables. Raises InputError for bad settings
    or input.
    """
    run_job(HallucinationJob(hallucination_settings({"run": _uri(run), **_with_executor(settings)})))
    return open_run(_uri(run)).table("opinions")


@takes(BiasSettings)
def bias(run: Run | str, **settings: Any) -> pa.Table:
    """Move images' embeddings between pairs of prompts, or resume, and return how answers shift, with controls.

    The answers are in the run's tables. Raises InputError for bad settings or input.
    """
    run_job(BiasJob(bias_settings({"run": _uri(run), **_with_executor(settings)})))
    return open_run(_uri(run)).table("bias")


@takes(PerturbationSettings)
def perturb(**settings: Any) -> list[dict[str, Any]]:
    """Perturb image embeddings from one concept towards another, and return how answers change, with controls.

    Raises InputError for bad settings or input.
    """
    done = run_job(PerturbJob(perturbation_settings(_with_executor(settings))))
    measures: list[dict[str, Any]] = done.headline["measures"]
    return measures


@takes(CensusSettings)
def census(model: str, data: str, out: str, **settings: Any) -> Run:
    """Run a census to its end, or resume it, and return the run.

    Failed samples are in the run's table `errors`, quarantined shards in its status. Warns about captions in a language
    without noun tagging. Raises InputError for bad settings or input.
    """
    drive_census(
        census_settings({"model": model, "data": data, "out": str(out), **_with_executor(settings)}),
        # The warning points at the caller of this function.
        warn=lambda line: warnings.warn(line, stacklevel=5),
    )
    return open_run(out)


run_census = census
"""The name of earlier versions."""
