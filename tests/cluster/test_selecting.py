"""Neurons are chosen on the samples and the model that the run saw, or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.cluster.selecting import select_neurons
from mmray.demo import DATA
from mmray.errors import InputError
from mmray.results.run import Run, open_run
from tests.running import census_here


def scenes(start: int) -> pa.Table:
    rows = [row for row in pq.read_table(DATA).slice(0, 300).to_pylist() if row["language"] == "en"]
    return pa.Table.from_pylist(rows[start : start + 8], schema=pq.read_schema(DATA))


@pytest.fixture
def run(tiny: Callable[[str], Path], tmp_path: Path) -> Run:
    """A run of eight English scenes on a model in the same folder."""
    (tmp_path / "data").mkdir()
    pq.write_table(scenes(0), tmp_path / "data" / "1.parquet")
    shutil.copytree(tiny("llava"), tmp_path / "model")
    census_here(tmp_path / "model", str(tmp_path / "data"), tmp_path / "run", shard_size=3)
    return open_run(str(tmp_path / "run"))


def test_what_the_data_has_gained_is_left_out(run: Run, tmp_path: Path) -> None:
    concept = next(iter(run.concepts))
    (before,) = select_neurons(run, [concept], 5)
    # A file before the run's own: what is in which shard would be another.
    pq.write_table(scenes(8), tmp_path / "data" / "0.parquet")
    (after,) = select_neurons(run, [concept], 5)
    assert after.neurons == before.neurons
    assert (after.own_places, after.other_places) == (before.own_places, before.other_places)
    assert before.own_places == run.concepts[concept]


def test_other_data_or_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    concept = next(iter(run.concepts))
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    config.write_text(text + "\n")
    with pytest.raises(InputError, match="model: no longer the model of") as refusal:
        select_neurons(run, [concept], 5)
    assert "\n" not in str(refusal.value)
    config.write_text(text)
    file = tmp_path / "data" / "1.parquet"
    pq.write_table(scenes(1), file)
    with pytest.raises(InputError, match=r"1\.parquet has changed since it was analysed"):
        select_neurons(run, [concept], 5)
