"""Neurons are chosen on the samples and the model that the run saw, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.api import select
from mmray.demo import DATA
from mmray.errors import InputError
from mmray.runs.run import Run, open_run
from tests.support.command import Answer
from tests.support.local_jobs import census_here


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
    (before,) = select(run, [concept], 5, executor="local")
    # A file before the run's own: what is in which shard would be another.
    pq.write_table(scenes(8), tmp_path / "data" / "0.parquet")
    (after,) = select(run, [concept], 5, executor="local")
    assert after.neurons == before.neurons
    assert (after.own_places, after.other_places) == (before.own_places, before.other_places)
    assert before.own_places == run.concepts[concept]


def parts(run: Run) -> set[Path]:
    return set(Path(run.uri).glob("select/*/shards/*/*"))


def test_samples_are_gone_through_once(run: Run) -> None:
    concept = next(iter(run.concepts))
    (first,) = select(run, [concept], 5, executor="local")
    before = parts(run)
    assert len(before) == 2 * 2, "the concept is in two of the three shards"
    (again,) = select(run, [concept.upper()], 5, executor="local")
    assert again == first
    (fewer,) = select(run, [concept], 3, executor="local")
    assert len(fewer.neurons) == 3
    assert parts(run) == before


def test_the_command(run: Run, mmray: Callable[..., Answer]) -> None:
    concept = next(iter(run.concepts))
    (chosen,) = select(run, [concept], 5, executor="local")
    answer = mmray("select", run.uri, concept, "--k", 5, "--local", "--json")
    assert answer.status == 0
    (found,) = json.loads(answer.out)
    assert found == vars(chosen) | {"neurons": chosen.neurons.to_pylist()}
    assert "ablated together" in mmray("select", run.uri, concept, "--k", 5, "--local").out


def test_other_data_or_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    concept = next(iter(run.concepts))
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    config.write_text(text + "\n")
    with pytest.raises(InputError, match="model: no longer the model of") as refusal:
        select(run, [concept], 5, executor="local")
    assert "\n" not in str(refusal.value)
    config.write_text(text)
    file = tmp_path / "data" / "1.parquet"
    pq.write_table(scenes(1), file)
    with pytest.raises(InputError, match=r"1\.parquet has changed since it was analysed"):
        select(run, [concept], 5, executor="local")
