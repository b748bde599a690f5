"""An alignment on Ray Train: any number of workers, killed or not, gives the same network; refusals."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load

from mmray.cluster import alignment_training
from mmray.cluster.alignment import run_alignment
from mmray.errors import InputError
from mmray.perception.alignment import WEIGHTS
from mmray.perception.alignment_settings import alignment_settings
from mmray.storage import open_store
from tests.bench.alignment import own_workers
from tests.e2e.scenes import scenes, write

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


def weights(out: str):
    return load(open_store(out).read(WEIGHTS))


def test_killed_or_not_and_of_any_number_of_workers_it_is_the_same(asked, tmp_path: Path, ray_here: str, monkeypatch):
    alone, killed = str(tmp_path / "alone"), f"s3://{ray_here}/killed"
    done = run_alignment(alignment_settings({**asked, "out": alone, "workers": 1}))
    assert (done.images, done.lost, done.steps) == (120, 0, 30)
    # A model with random weights may write the image's own token, and can't be asked along that.
    assert done.measures["recall"]["n"] + done.failures == 4

    struck: list[int] = []

    def strike() -> None:
        store = open_store(killed)
        while not struck:
            time.sleep(0.05)
            workers = own_workers()
            if workers and store.list(alignment_training.PREFIX):
                os.kill(workers[-1], signal.SIGKILL)
                struck.append(workers[-1])

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    again = run_alignment(alignment_settings({**asked, "out": killed, "workers": 2}))
    assert struck
    assert (again.images, again.lost, again.steps) == (120, 0, 30)
    one, other = weights(alone), weights(killed)
    for name, value in one.items():
        # Adam divides by gradients' size: where that is next to nothing, the order of a sum is seen.
        assert float((value - other[name]).abs().max()) < 1e-3, name
    assert again.loss == pytest.approx(done.loss, rel=1e-3)
    # The same again has nothing to do, and other settings are refused.
    assert run_alignment(alignment_settings({**asked, "out": killed})).measures == again.measures
    with pytest.raises(InputError, match=r"holds a run with other settings \(epochs was 3, now 1"):
        run_alignment(alignment_settings({**asked, "out": killed, "epochs": 1}))


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
