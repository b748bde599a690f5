"""Checks of a model: every claim that loading verifies, a census of two samples, and what else works with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from mmray.data.samples import Sample
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.models.capture import has_gates
from mmray.models.loading import LoadedModel
from mmray.models.patches import patches_of
from mmray.models.processing import noise_image
from mmray.neurons.row_sharing import RowSharing
from mmray.neurons.validation import CAPTIONS, NOUNS, Check, check_parts, claims_of, example


@dataclass(frozen=True)
class Ability:
    """Something that works with some models only, and why it does not with this one."""

    name: str
    problem: str
    """Empty if it works."""


def check_model(model: LoadedModel) -> list[Check]:
    """Check every claim about a model."""
    return check_parts(model, claims_of(model) | {"a census of two samples": small_census})


def abilities_of(model: LoadedModel) -> list[Ability]:
    """Return what needs more than the checks prove, and whether this model has it."""
    return [Ability(name, problem(model)) for name, problem in ABILITIES.items()]


TEXT_ONLY = "the model reads text only"


def _image_problem(model: LoadedModel) -> str:
    return "" if model.parts.reads_images else TEXT_ONLY


def _maps_problem(model: LoadedModel) -> str:
    if problem := _image_problem(model):
        return problem
    grid = patches_of(model, example(model), 0, noise_image().size)
    return "" if grid else "the image has no grid of tokens in the sequence, or none that is shown to be right"


def _gates_problem(model: LoadedModel) -> str:
    return "" if has_gates(model.network, model.projections) else "the gates have no activation function of their own"


def _steering_problem(model: LoadedModel) -> str:
    experts = any(projection.experts for projection in model.projections)
    return "the neurons of routed experts can't be set" if experts else ""


def _learning_problem(model: LoadedModel) -> str:
    ends = all(projection.ends_block for projection in model.projections)
    return "" if ends else "its blocks go on after their MLP; --method zero works"


def _module_problem(module: str) -> Callable[[LoadedModel], str]:
    return lambda model: _image_problem(model) or ("" if model.parts.of(module) else "no MLP of it was found")


ABILITIES: dict[str, Callable[[LoadedModel], str]] = {
    "heat maps, saliency": _maps_problem,
    "generated captions, properties, hallucination, POPE, perturb, align": _image_problem,
    "captions of an image share a row": lambda model: _image_problem(model) or RowSharing(model).problem,
    "--score gate": _gates_problem,
    "edits that are learned": _learning_problem,
    "selectivity --steer": _steering_problem,
    "neurons of the vision tower": _module_problem("vision"),
    "neurons of the projector": _module_problem("projector"),
}
"""Name → function that says what is wrong."""


def small_census(model: LoadedModel) -> tuple[bool, str]:
    """Run two samples through all steps of a census worker."""
    image: bytes | None = None
    if model.parts.reads_images:
        buffer = io.BytesIO()
        noise_image().save(buffer, "PNG")
        image = buffer.getvalue()
    samples = [Sample(str(number), "check", image, text, "en") for number, text in enumerate(CAPTIONS)]
    settings = census_settings({"model": model.name, "data": "check", "out": "check"})
    tables = ShardAnalysis(model, settings, NOUNS, 0).run(samples)
    found, failed = len(tables["occurrences"]), tables["errors"]["message"].to_pylist()
    # Each of the two captions has two of the nouns.
    return found == 4 and not failed, f"{found} occurrences in 2 captions" + (f"; {failed[0]}" if failed else "")
