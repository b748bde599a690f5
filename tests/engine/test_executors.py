"""Jobs are told from Python, and by the command line, where to run."""

import pytest
import ray

import mmray
from mmray.engine import JobSettings, LocalExecutor, checked, executor_for
from mmray.errors import InputError
from mmray.job_settings import execution


def test_a_census_runs_in_this_process(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    run = mmray.run_census(str(tiny("llava")), "demo", tmp_path / "run", limit=2, executor="local")
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
