"""The files that put mmray on a cluster: valid where that can be told offline, and true to the jobs that they start."""

import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmray.cli.job import words_of
from mmray.features.census.settings import census_settings
from mmray.features.pipeline.job import pipeline_settings
from mmray.terminal.config import read_config

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "jobs" / "kubernetes"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def job_specs() -> dict[str, dict[str, Any]]:
    return {
        "rayjob.yaml": documents(KUBERNETES / "rayjob.yaml")[0]["spec"],
        "raycronjob.yaml": documents(KUBERNETES / "raycronjob.yaml")[0]["spec"]["jobTemplate"],
    }


def entrypoints() -> list[str]:
    """Every command line of a job that the files and their comments show."""
    texts = [path.read_text() for path in (ROOT / "cluster.yaml", *KUBERNETES.glob("*.yaml"), *ROOT.glob("jobs/*.py"))]
    return list(chain.from_iterable(re.findall(r"python jobs/\w+\.py --config [^\n]*", text) for text in texts))


def test_the_launcher_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert kinds
    for kind in kinds.values():
        assert kind["resources"]["GPU"] >= 1
        assert kind["min_workers"] == 0
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    # What a message that something is amiss would look like.
    del config["available_node_types"]["gpu"]["node_config"]
    with pytest.raises(Exception, match="node_config"):
        validate_config(prepare_config(config))


def test_there_are_entrypoints_to_check() -> None:
    assert len(entrypoints()) >= 5


@pytest.mark.parametrize("entrypoint", entrypoints())
def test_entrypoints_start_jobs_with_settings_that_they_have(entrypoint: str) -> None:
    _, script, flag, config, *overrides = shlex.split(entrypoint)
    assert (ROOT / script).is_file()
    assert flag == "--config"
    settings = read_config(ROOT / config, overrides)
    command = Path(script).stem
    if command == "pipeline":
        pipeline_settings(settings)
    else:
        words_of(command, settings)
    if command == "census":
        census_settings(settings)


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_ray_jobs_of_kubernetes(name: str) -> None:
    document = documents(KUBERNETES / name)[0]
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"] == {"rayjob.yaml": "RayJob", "raycronjob.yaml": "RayCronJob"}[name]
    spec = job_specs()[name]
    assert spec["entrypoint"] in " ".join(entrypoints())
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    containers = [part["template"]["spec"]["containers"][0] for part in (cluster["headGroupSpec"], group)]
    assert containers[0]["image"] == containers[1]["image"]
    assert containers[1]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_both_ray_jobs_are_on_the_same_cluster() -> None:
    first, second = job_specs().values()
    assert first["rayClusterSpec"] == second["rayClusterSpec"]


def test_the_cron_job_may_create_what_it_creates() -> None:
    cron, account, role, binding = documents(KUBERNETES / "cronjob.yaml")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert pod["volumes"][0]["name"] == pod["containers"][0]["volumeMounts"][0]["name"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    schedule = documents(KUBERNETES / "raycronjob.yaml")[0]["spec"]["schedule"]
    assert cron["spec"]["schedule"] == schedule
    assert len(schedule.split()) == 5


def test_images_are_of_a_ray_that_the_project_takes() -> None:
    version = job_specs()["rayjob.yaml"]["rayClusterSpec"]["rayVersion"]
    assert f"FROM rayproject/ray:{version}-py311-gpu" in (KUBERNETES / "Dockerfile").read_text()


def script_of(name: str) -> str:
    """Return the shell script that a Slurm or SkyPilot file runs on its machines."""
    path = ROOT / "jobs" / name
    return path.read_text() if path.suffix == ".sbatch" else documents(path)[0]["run"]


@pytest.mark.parametrize("name", ["slurm/census.sbatch", "skypilot/census.yaml"])
def test_scripts_start_ray_on_every_machine_and_the_job_on_one(name: str, tmp_path: Path) -> None:
    bin = tmp_path / "env" / "bin"
    bin.mkdir(parents=True)
    (bin / "activate").write_text("")
    # srun runs its arguments; ray prints those that it was given.
    for command, body in {"scontrol": "printf 'n1\\nn2\\n'", "srun": '"$@"', "ray": 'printf "%s\\n" "$@"'}.items():
        (bin / command).write_text(f"#!/bin/sh\n{body}\n")
        (bin / command).chmod(0o755)
    variables = {
        "HOME": str(tmp_path),
        "PATH": f"{bin}:/usr/bin:/bin",
        "DATA": "s3://b/captions",
        "OUT": "s3://b/runs/llava",
        **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"},
        **{"SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "1"},
        **{"SKYPILOT_NODE_IPS": "n1\nn2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"},
    }
    given = ["data=s3://b/captions", "out=s3://b/runs/llava"] if name.startswith("slurm") else []
    ran = subprocess.run(
        ["bash", "-c", script_of(name), "script", *given], env=variables, capture_output=True, text=True, check=True
    )
    words = ran.stdout.split("\n")[:-1]
    ray, command = words[: words.index("--")], words[words.index("--") + 1 :]
    options = dict(zip(ray[1::2], ray[2::2], strict=True))
    assert ray[0] == "symmetric-run"
    assert (options["--address"], options["--min-nodes"], options["--num-gpus"]) == ("n1:6379", "2", "1")
    assert command[:3] == ["python", "jobs/census.py", "--config"]
    settings = census_settings(read_config(ROOT / command[3], command[4:]))
    # Without an address, the job would start a Ray of its own on this machine alone.
    assert settings.address == "auto"
    assert (settings.data, settings.out) == ("s3://b/captions", "s3://b/runs/llava")
