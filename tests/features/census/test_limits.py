"""Ids that occur twice and labels of many values end a census before it begins; a long id is one bad row of it."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.demo import DATA
from mmray.errors import InputError
from mmray.features.census.refresh import refresh_run
from mmray.runs.run import open_run
from tests.support.local_jobs import census_here


def write(folder: Path, ids: list[str], name: str = "a.parquet", **columns: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    rows = pq.read_table(DATA).slice(0, len(ids)).select(["image", "caption"])
    for column, values in {"id": ids, **columns}.items():
        rows = rows.append_column(column, pa.array(values))
    pq.write_table(rows, folder / name)
    return str(folder)


def test_a_census_of_ids_that_occur_twice_does_not_begin(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data", ["a", "b", "c", "a"])
    with pytest.raises(InputError, match=r"1 row has the id of an earlier row in column 'id', the first 'a'; .*none"):
        census_here(tiny("llava"), data, tmp_path / "run", shard_size=2)
    assert not (tmp_path / "run").exists()
    assert census_here(tiny("llava"), data, tmp_path / "run", shard_size=2, id_column="none").samples == 4


def test_a_refresh_takes_no_id_that_the_run_has(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data", ["a", "b", "c"])
    census_here(tiny("llava"), data, tmp_path / "run", shard_size=2)
    write(tmp_path / "data", ["d", "b"], "b.parquet")
    with pytest.raises(InputError, match="the first 'b'"):
        refresh_run(str(tmp_path / "run"), local=True)
    assert open_run(tmp_path / "run").status().samples == 3


def test_a_census_of_many_labels_does_not_begin(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    names = [f"{number}" for number in range(300)]
    data = write(tmp_path / "data", names, domain=names)
    with pytest.raises(InputError, match="domain has 300 values, more than 256"):
        census_here(tiny("llava"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_long_id_is_one_bad_row(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data", ["a", "b" * 100_000, "c"])
    outcome = census_here(tiny("llava"), data, tmp_path / "run")
    assert outcome.failures >= 1
    run = open_run(tmp_path / "run")
    assert sorted(run.table("captions")["sample_id"].to_pylist()) == ["a", "c"]
    (row,) = [row for row in run.table("errors").to_pylist() if row["stage"] == "read"]
    assert row["message"] == "sample id of 100,000 bytes in column 'id'; at most 1,024"
    assert (tmp_path / "run/tables/examples.parquet").exists()
