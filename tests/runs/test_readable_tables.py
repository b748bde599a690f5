"""Tables that others read: `datasets`, pandas and DuckDB, whatever is in them, and those of earlier versions."""

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.features import table_schemas
from mmray.features.census.tables import TABLES
from mmray.runs.run import Run, open_run
from mmray.runs.tables import from_bytes, to_bytes
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

datasets = pytest.importorskip("datasets")

SCHEMAS = table_schemas()


@pytest.fixture(scope="module")
def labelled(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run without failures, whose samples have a further label."""
    folder = tmp_path_factory.mktemp("labelled")
    data = write(folder / "data.parquet", scenes(6))
    census_here(tiny("llava"), data, folder / "run", label_column=["domain"], top_k=3)
    return open_run(folder / "run")


@pytest.fixture
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", TABLES)
def test_datasets_loads_every_table(run: Run, labelled: Run, name: str, tmp_path: Path) -> None:
    for opened in (run, labelled):
        file = f"{opened.uri}/tables/{name}.parquet"
        rows = opened.table(name)
        # An empty table is a stream of nothing: `datasets` keeps no empty split otherwise.
        loaded = datasets.load_dataset(
            "parquet", data_files=file, cache_dir=str(tmp_path), split="train", streaming=not len(rows)
        )
        assert list(loaded.features) == rows.column_names
        assert list(loaded.take(1) if not len(rows) else loaded.select([0])) == rows.slice(0, 1).to_pylist()
        assert len(pd.read_parquet(file)) == len(rows)
        assert duckdb.sql(f"select count(*) from '{file}'").fetchall() == [(len(rows),)]


@pytest.mark.usefixtures("quiet")
def test_an_empty_file_among_others_is_no_error(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([{"stage": "read", "message": "no caption"}], schema=TABLES["errors"])
    for number, table in enumerate((TABLES["errors"].empty_table(), rows)):
        (tmp_path / f"{number}.parquet").write_bytes(to_bytes(table))
    files = sorted(map(str, tmp_path.glob("*.parquet")))
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert list(loaded) == rows.to_pylist()


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_table_has_a_type_that_datasets_lacks(name: str) -> None:
    datasets.Features.from_arrow_schema(SCHEMAS[name])
    empty = from_bytes(to_bytes(SCHEMAS[name].empty_table()))
    assert empty.schema.equals(SCHEMAS[name])
    assert [field.metadata for field in empty.schema] == [field.metadata for field in SCHEMAS[name]]


def test_labels_are_key_and_value(labelled: Run) -> None:
    assert set(labelled.table("activity")["label_kind"].to_pylist()) >= {"domain"}
    found = labelled.sql("select caption, map_from_entries(labels)['domain'] as label from captions").to_pylist()
    assert {row["caption"]: row["label"] for row in found} == {row["caption"]: row["domain"] for row in scenes(6)}


def test_maps_of_earlier_versions_are_read_as_lists() -> None:
    old = pa.table({"labels": pa.array([[("a", "b"), ("c", "d")], None, []], pa.map_(pa.string(), pa.string()))})
    buffer = pa.BufferOutputStream()
    pq.write_table(old, buffer)
    now = from_bytes(buffer.getvalue().to_pybytes())
    assert now.schema.field("labels").type == TABLES["captions"].field("labels").type
    pairs = [{"key": "a", "value": "b"}, {"key": "c", "value": "d"}]
    assert now["labels"].to_pylist() == [pairs, None, []]
