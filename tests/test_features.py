"""Every job has a line in the table of features, and every line is true of its job."""

import ast
from inspect import isabstract
from pathlib import Path
from pkgutil import resolve_name

import pytest

import mmray
from mmray.engine import Job
from mmray.features import FEATURES, command_for, table_schemas
from mmray.features.census.partial_merge import PartialMerge

ROOT = Path(mmray.__file__).parent


def modules_with_jobs():
    """Return the modules with a class that is derived from a job, found without importing anything."""
    for path in ROOT.rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
        if any("Job" in ast.unparse(base) for found in classes for base in found.bases):
            yield ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def concrete(job):
    for kind in job.__subclasses__():
        yield from concrete(kind)
        if kind.__module__.startswith("mmray.") and not isabstract(kind):
            yield kind


def test_every_job_has_a_line_and_every_line_its_job():
    for module in modules_with_jobs():
        resolve_name(module)
    # A partial merge is no feature: what it leaves lasts as long as the merge that it is for.
    found = {f"{job.__module__}:{job.__qualname__}" for job in concrete(Job) if not issubclass(job, PartialMerge)}
    named = [name for feature in FEATURES.values() for name in feature.jobs]
    assert len(named) == len(set(named))
    assert found == set(named)


@pytest.mark.parametrize("feature", FEATURES.values(), ids=list(FEATURES))
def test_a_line_says_what_its_jobs_say(feature):
    for name in feature.jobs:
        job = resolve_name(name)
        assert (job.name, job.unit_noun) == (feature.name, feature.noun)


def test_every_table_is_made_by_one_feature():
    made = [table for feature in FEATURES.values() for table in feature.tables]
    assert sorted(made) == sorted(table_schemas())
    assert command_for("saliency_maps") == "mmray saliency RUN"


def test_no_room_has_a_table_that_no_feature_names():
    for feature in FEATURES.values():
        if feature.schemas:
            named = {table for other in FEATURES.values() if other.schemas == feature.schemas for table in other.tables}
            assert set(resolve_name(f"{feature.schemas}:TABLES")) == named
