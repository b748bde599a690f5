"""Models for the tests of every room (tiny random checkpoints of each family, and the demo), and an S3 on loopback."""

import fcntl
import gc
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Set before torch is imported, for this process and all that it starts, because several share the cores. Sums depend on
# how many threads add them up: a census of this process is compared, to the last bit, with one of actors of one thread.
# Where an actor has more, a waiting thread sleeps: spinning, which is the default, takes the core that others wait for.
# Ray's workers are as important as what waits for them; by default they give way to everything else. Ray Train looks at
# its workers every two seconds by default, and each step with a checkpoint waits for that.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.05",
}

# As the command line does: with everything imported, a collection of all objects takes a third of a second.
gc.set_threshold(100_000)

# Examples are the same at every run, and a busy machine fails no test by its slowness.
hypothesis.settings.register_profile("mmray", deadline=None, derandomize=True, database=None, max_examples=100)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("mmray"), max_examples=40)

# Assertions of shared helpers say what differs, as those of tests do.
pytest.register_assert_rewrite("tests.support")
pytest_plugins = [
    f"tests.support.{name}" for name in ("chromium", "command", "joint_models", "shared", "small_run", "text_models")
]

BUCKET = "mmray-test"


def pytest_configure(config: pytest.Config) -> None:
    """Try fewer examples of a property where slow tests are left out too."""
    hypothesis.settings.load_profile("quick" if config.getoption("markexpr") == "not slow" else "mmray")


SLOW_FIXTURES = {"alone", "ray_here", "demo_census", "coco_run", "suite", "before"}
"""Ray sessions, censuses of the demo, and its replies: a test that needs one is slow."""


QUICK_VARIANTS = {"llava", "gemma3", "qwen2_vl", "blip2_t5"}
"""Of a test of all tiny models, the cases that are not slow: plain, with norms of its own, with positions in three
dimensions, and with an encoder."""

ALONE = (
    "tests/e2e/test_job_submit.py",
    "tests/e2e/test_joint_path.py",
    "tests/features/alignment/test_job.py",
    "tests/features/census/test_kills.py",
)
"""Files that hold other clusters off (`alone`). One process runs them all: a second one would only wait for it."""

CONTRACT = (
    "tests/engine/test_compositions.py",
    "tests/engine/test_contract.py",
    "tests/engine/test_damage.py",
    "tests/engine/test_on_ray.py",
)
"""Files that compare each job with an undisturbed run (`suite`). One process runs them all, and makes these once."""


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out files, those of ALONE together, and those of CONTRACT."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((group[0] for group in (ALONE, CONTRACT) if file in group), file)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start ALONE first, then other files with slow tests."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if SLOW_FIXTURES & fixtures:
            item.add_marker(pytest.mark.slow)
        file = item.path.relative_to(config.rootpath).as_posix()
        assert ("alone" in fixtures) <= (file in ALONE), f"{file} uses `alone`: add it to ALONE"
        files.setdefault(file, []).append(item)
    slow = {file for file, tests in files.items() if any(test.get_closest_marker("slow") for test in tests)}
    mark_variants(items)
    # Stable: otherwise files keep their order.
    order = sorted(files, key=lambda file: (file not in ALONE, file not in slow))
    items[:] = [test for file in order for test in files[file]]


def mark_variants(items: list[pytest.Item]) -> None:
    """Mark tests of all tiny models as slow, except those of QUICK_VARIANTS."""
    from mmray.models.tiny.variants import VARIANTS

    tests: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for variant in (value for value in params.values() if isinstance(value, str) and value in VARIANTS):
            tests.setdefault(item.nodeid.partition("[")[0], {}).setdefault(variant, []).append(item)
    for cases in tests.values():
        # A test of a few was written for these.
        if len(cases) > len(VARIANTS) / 2:
            for variant in cases.keys() - QUICK_VARIANTS:
                for item in cases[variant]:
                    item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep notes of proven models apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Have this process write without `fsync`: no test turns the machine off, and some write thousands of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """Return the checkpoint folder of a variant, built once per session."""
    from mmray.models.tiny.checkpoints import build

    return cache(lambda variant: shared(variant, lambda folder: build(variant, folder)))


@pytest.fixture(scope="session")
def open_model(tiny: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a variant, or the demo, as `mmray.load_model` gives it; shared by all tests: leave it as it was."""
    from mmray.neurons.model import load_model

    return cache(lambda name: load_model("demo" if name == "demo" else str(tiny(name))))


@pytest.fixture(scope="session")
def open_type(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Any]:
    """Return a type outside the table as `mmray.load_model` gives it; shared by all tests: leave it as it was."""
    from mmray.models.tiny.kind_checkpoints import build
    from mmray.neurons.model import load_model

    return cache(lambda name: load_model(str(shared(f"type {name}", lambda folder: build(name, folder)))))


@pytest.fixture(scope="session")
def demo(open_model: Callable[[str], Any]) -> Any:
    return open_model("demo")


@pytest.fixture(scope="session")
def loaded_with(open_model: Callable[[str], Any]) -> Callable[..., Any]:
    """Return a variant whose decoder's configuration differs in these settings, with seeded random weights."""
    from dataclasses import replace

    import torch

    from mmray.models.parts import locate
    from tests.support.networks import Loaded

    def make(variant: str, **settings: Any) -> Any:
        model = open_model(variant)
        network = Loaded(model.network, model.processor, {}).variation(**settings).eval().requires_grad_(False)
        random = torch.Generator().manual_seed(0)
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2, generator=random)
        return replace(model, network=network, parts=locate(network))

    return make


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return COCO-like data with five captions per image (`tests.support.coco_like.CocoLike`)."""
    from tests.support.coco_like import coco_like

    return coco_like(tmp_path_factory.mktemp("coco"), images=24, held_out=8)


@pytest.fixture(scope="session")
def coco_run(coco: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo model's census of `coco.train`; shared by all tests: add to it, and leave its tables alone."""
    from tests.support.local_jobs import census_here

    out = tmp_path_factory.mktemp("coco") / "run"
    assert census_here("demo", str(coco.train), out, shard_size=60).complete
    return out


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Return the bucket of an S3 that answers on loopback only, for this process and those it starts."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    from mmray import storage

    one_at_a_time, put = threading.Lock(), S3Response.put_object

    def put_object(request: S3Response) -> Any:
        # S3 decides on If-None-Match and writes in one step; moto looks first, and lets another request in between.
        with one_at_a_time:
            return put(request)

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        storage.s3_client.cache_clear()
        storage.s3_client().create_bucket(Bucket=BUCKET)
        yield BUCKET
        storage.s3_client.cache_clear()
    server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return a fresh store of each kind."""
    from mmray.storage import open_store

    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/run")


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[None]:
    """Have no more rights than the owner of `tmp_path` while the test runs: root, too, is refused what is forbidden."""
    if os.geteuid() != 0:
        yield
        return
    nobody, mine = 65534, tmp_path.parents[:-2]  # not those above the system's folder for temporary files
    modes = {folder: folder.stat().st_mode for folder in mine}
    for folder in mine:
        folder.chmod(modes[folder] | 0o011)
    os.chown(tmp_path, nobody, nobody)
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


@pytest.fixture(scope="session")
def forks() -> Iterator[None]:
    """Have Ray's workers forked from a process with everything imported; they have the environment of this moment."""
    from tests.support.forked_workers import forked_workers

    with forked_workers():
        yield


@pytest.fixture(scope="session")
def ray_here(bucket: str, forks: None) -> Iterator[str]:
    """Start Ray once; its workers have the environment of this moment. Returns the bucket."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    import ray
    import ray.data

    # "local": a cluster that other tests have started at the same time is not joined.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield bucket
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hold other files' clusters off: two that are started at once may choose the same free port."""
    # Processes of pytest-xdist have folders of their own in a common one.
    with (tmp_path_factory.getbasetemp().parent / "clusters.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
