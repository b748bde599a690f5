"""Jobs are told from Python, and by the command line, where to run."""

from typing import Any

import pytest
import ray

import mmray
from mmray.engine import JobSettings, LocalExecutor, checked, executor_for
from mmray.engine.settings import execution
from mmray.errors import InputError
from mmray.features.alignment.settings import alignment_settings
from mmray.features.evaluation.settings import EvaluationSettings, evaluation_settings
from mmray.features.hallucination.settings import hallucination_settings, perturbation_settings
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.settings import saliency_settings
from mmray.features.selectivity.settings import selectivity_settings


def test_a_census_runs_in_this_process(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    run = mmray.census(str(tiny("llava")), "demo", tmp_path / "run", limit=2, executor="local")
    assert run.table("captions").num_rows == 2
    with pytest.raises(InputError, match="unknown executor 'cloud'; choose from ray, local"):
        mmray.properties(run, executor="cloud")


def test_settings_choose_the_executor():
    assert isinstance(executor_for(checked(JobSettings, {"local": True})), LocalExecutor)
    executor = executor_for(checked(JobSettings, {"workers": "2:3", "gpus_per_worker": 1}))
    assert (executor.workers, executor.gpus_per_worker, executor.address) == ((2, 3), 1, None)


def test_only_settings_that_change_results_are_in_the_fingerprint():
    class Own(JobSettings):
        run: str = execution()
        size: int = 1

    base = checked(Own, {"run": "a"})
    same = checked(Own, {"run": "b", "workers": 3, "address": "auto", "local": True, "unit_timeout": 5})
    assert base.fingerprint({"data": "x"}) == same.fingerprint({"data": "x"})
    assert base.fingerprint({"data": "x"}) != base.fingerprint({"data": "y"})
    assert base.fingerprint({"data": "x"}) != checked(Own, {"run": "a", "size": 2}).fingerprint({"data": "x"})


def given(**workers: object) -> list[Any]:
    return [
        property_settings({"run": "r", **workers}),
        saliency_settings({"run": "r", **workers}),
        selectivity_settings({"run": "r", "by": "language", **workers}),
        hallucination_settings({"run": "r", **workers}),
        perturbation_settings({"model": "m", "data": "d", "out": "o", **workers}),
        evaluation_settings({"run": "r", "edit": "e", "data": "d", **workers}),
        alignment_settings({"tower": "t", "model": "m", "data": "d", "out": "o", "validate_on": "v", **workers}),
    ]


def test_workers_are_a_number_or_a_range_everywhere() -> None:
    for asked, expected in ((2, (2, 2)), ("3", (3, 3)), ("2:4", (2, 4)), (None, None)):
        assert [settings.worker_range for settings in given(workers=asked)] == [expected] * 7
    for wrong in ("0", "4:2", "x", "2:"):
        with pytest.raises(InputError, match=r"MIN:MAX such as 2:16"):
            given(workers=wrong)


@pytest.mark.parametrize(
    ("change", "same"), [({"draws": 7}, True), ({"detector": "elsewhere"}, True), ({"seed": 1}, False)]
)
def test_what_an_evaluation_is_known_by(change: dict[str, Any], same: bool) -> None:
    one: EvaluationSettings = evaluation_settings({"run": "r", "edit": "e", "data": "d", "detector": "demo"})
    other = one.model_copy(update=change)
    # What a detector is, is among the digests.
    assert (one.fingerprint({"detector": "x"}) == other.fingerprint({"detector": "x"})) == same
    assert one.fingerprint({"detector": "x"}) != one.fingerprint({"detector": "y"})
