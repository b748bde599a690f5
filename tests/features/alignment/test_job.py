"""An alignment on Ray Train: any number of workers, killed or not, gives the same network; refusals."""

import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from ray.train import WorkerGroupError
from safetensors.torch import load

from mmray.data.shards import Manifest
from mmray.detector.alignment import WEIGHTS
from mmray.errors import InputError
from mmray.features.alignment import job as alignment_job
from mmray.features.alignment import training
from mmray.features.alignment.job import Aligned, run_alignment
from mmray.features.alignment.settings import AlignmentSettings, alignment_settings
from mmray.features.alignment.training import open_pair
from mmray.storage import open_store
from tests.bench.alignment import own_workers
from tests.support.forked_workers import use
from tests.support.kills import cheap_processes
from tests.support.scenes import scenes, write

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone", "ray_here")]


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment")
    data = write(folder / "data.parquet", scenes(40))
    return {
        "tower": str(tiny("llava")),
        "model": str(tiny("llava")),
        "data": data,
        "validate_on": write(folder / "validate.parquet", scenes(4)),
        "hidden": 16,
        "batch_size": 4,
        "epochs": 3,
        "checkpoint_every": 4,
        "learning_rate": 1e-3,
        "draws": 20,
    }


def align(settings: AlignmentSettings) -> None:
    """Be a driver, with a Ray of its own."""
    use()
    run_alignment(settings)


def weights(out: str):
    return load(open_store(out).read(WEIGHTS))


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory, ray_here: str):
    out = str(tmp_path_factory.mktemp("undisturbed") / "out")
    told: list[tuple[int, int]] = []
    with patch.object(alignment_job, "POLL_SECONDS", 0.02):
        done = run_alignment(
            alignment_settings({**asked, "out": out, "workers": 1}),
            lambda progress: told.append((progress.done, progress.total)),
        )
    assert (done.images, done.lost, done.steps) == (120, 0, 30)
    # A model with random weights may write the image's own token, and can't be asked along that.
    assert done.measures["recall"]["n"] + done.failures == 4
    learnt = [samples for samples, total in told if total == 120]
    assert learnt and learnt == sorted(learnt) and set(learnt) <= {*range(16, 120, 16), 120}
    assert told[-1] == (4, 4)
    return done


def assert_same(done: Aligned, undisturbed: Aligned) -> None:
    assert (done.images, done.lost, done.steps) == (120, 0, 30)
    one, other = weights(undisturbed.out), weights(done.out)
    for name, value in one.items():
        # Adam divides by gradients' size: where that is next to nothing, the order of a sum is seen.
        assert float((value - other[name]).abs().max()) < 1e-3, name
    assert done.loss == pytest.approx(undisturbed.loss, rel=1e-3)


def test_with_a_worker_killed_and_another_number_of_workers_it_is_the_same(asked, undisturbed: Aligned, ray_here: str):
    killed = f"s3://{ray_here}/killed"
    struck: list[int] = []

    def strike() -> None:
        store = open_store(killed)
        while not struck:
            time.sleep(0.1)
            workers = own_workers()
            if workers and store.list(training.PREFIX):
                os.kill(workers[-1], signal.SIGKILL)
                struck.append(workers[-1])

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    again = run_alignment(alignment_settings({**asked, "out": killed, "workers": 2}))
    assert struck
    assert_same(again, undisturbed)
    # The same again has nothing to do, and other settings are refused.
    assert run_alignment(alignment_settings({**asked, "out": killed})).measures == again.measures
    with pytest.raises(InputError, match=r"holds a run with other settings \(epochs was 3, now 1"):
        run_alignment(alignment_settings({**asked, "out": killed, "epochs": 1}))


def test_with_its_driver_killed_it_goes_on_and_is_the_same(asked, undisturbed: Aligned, tmp_path: Path, ray_here: str):
    settings = alignment_settings({**asked, "out": str(tmp_path / "out"), "workers": 1, "checkpoint_every": 1})
    driver = cheap_processes().Process(target=align, args=(settings,))
    driver.start()
    store = open_store(settings.out)
    until = time.monotonic() + 120
    while not store.list(training.PREFIX):
        assert driver.is_alive() and time.monotonic() < until
        time.sleep(0.02)
    driver.kill()
    driver.join()
    assert not store.exists(WEIGHTS), "it was done before it could be killed"
    assert_same(run_alignment(settings), undisturbed)


def test_a_worker_keeps_to_its_own_device(asked, tmp_path: Path):
    """Where Ray Train shows it those of others, too."""
    own = torch.device("meta")
    settings = alignment_settings({**asked, "out": str(tmp_path / "out")})
    pair = open_pair(settings, own)
    assert {value.device for part in (pair.model.network, pair.tower) for value in part.parameters()} == {own}
    folder = Mock(manifest=Manifest((), ()).to_json)
    with (
        patch.object(training, "get_device", lambda: own),
        patch.object(training, "open_pair", side_effect=InputError("enough")) as opened,
        pytest.raises(InputError, match="enough"),
    ):
        training._train(settings, folder, {})
    opened.assert_called_once_with(settings, own)


def test_data_without_objects_is_refused_before_any_work(asked, tmp_path: Path):
    rows = [{**row, "objects": None} for row in scenes(2)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows).drop_columns("objects"), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="no column of objects"):
        run_alignment(
            alignment_settings({**asked, "out": str(tmp_path / "out"), "validate_on": str(tmp_path / "bare.parquet")})
        )
    assert not (tmp_path / "out").exists()


def test_a_training_that_fails_for_good_is_one_line(asked, tmp_path: Path, ray_here: str):
    failed = WorkerGroupError("a worker raised", {0: ValueError("bad luck")})
    with (
        patch("ray.train.torch.TorchTrainer.fit", side_effect=failed),
        pytest.raises(InputError, match="run again to resume"),
    ):
        run_alignment(alignment_settings({**asked, "out": str(tmp_path / "out"), "workers": 1}))
