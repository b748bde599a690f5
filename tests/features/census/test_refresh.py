"""What data has gained is analysed, once, and the run is then as if all had been there from the beginning."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.demo import DATA
from mmray.errors import InputError
from mmray.features.census import job
from mmray.features.census.refresh import Refreshed, refresh_run
from mmray.features.census.shard import ShardAnalysis
from mmray.features.census.tables import TABLES
from mmray.runs.run import open_run
from tests.support.data_files import write_coco, write_csv, write_jsonl
from tests.support.local_jobs import census_here, files
from tests.support.scenes import scenes
from tests.support.stores import Killed, dying


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    """A folder in memory: dozens of refreshes write here, and each syncs many files."""
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llava")


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., None]:
    """Return what adds files of four English scenes each to the data."""
    rows = [row for row in pq.read_table(DATA).slice(0, 300).to_pylist() if row["language"] == "en"]
    schema = pq.read_schema(DATA)
    (tmp_path / "data").mkdir()

    def write(*numbers: int) -> None:
        for number in numbers:
            part = pa.Table.from_pylist(rows[4 * number : 4 * number + 4], schema=schema)
            pq.write_table(part, tmp_path / "data" / f"{number}.parquet")

    return write


def refresh(out: Path, **execution: Any) -> Refreshed:
    return refresh_run(str(out), **execution, local=True)


def by_sample(table: pa.Table) -> pa.Table:
    if "sample_id" in table.schema.names and "rank" not in table.schema.names:
        names = [name for name in ("sample_id", "position") if name in table.schema.names]
        table = table.sort_by([(name, "ascending") for name in names])
    return table.drop_columns([name for name in ("shard_id",) if name in table.schema.names])


def test_a_refreshed_run_is_that_of_all_data(model: Path, add: Callable[..., None], tmp_path: Path) -> None:
    add(1, 3)
    out = tmp_path / "run"
    census_here(model, str(tmp_path / "data"), out, shard_size=4)
    committed = {
        name: found for name, found in files(out).items() if name.startswith(("shards/", "receipts/", "decoded"))
    }
    before = open_run(out)
    ranked = before.table("rankings")
    add(0, 2, 4)  # new files sort before, between and after the old ones
    done = refresh(out)
    assert (done.new_samples, done.outcome.samples, done.outcome.complete) == (12, 20, True)
    assert {name: found for name, found in files(out).items() if name in committed} == committed
    assert len(open_run(out).folder.receipts()) == 5
    whole = tmp_path / "whole"
    census_here(model, str(tmp_path / "data"), whole, shard_size=4)
    for name in ("captions", "occurrences", "errors"):
        assert by_sample(open_run(out).table(name)).equals(by_sample(open_run(whole).table(name))), name
    for name, columns in {"rankings": ["concept", "rank", "neuron", "n"], "neurons": ["n_tokens", "n_active"]}.items():
        ours, theirs = open_run(out).table(name), open_run(whole).table(name)
        assert ours.select(columns).equals(theirs.select(columns)), name
    # What was compared with is kept, and so is the comparison.
    assert done.drift is not None
    kept = pq.read_table(out / "refreshes" / "000001" / "before" / "rankings.parquet")
    assert kept.equals(ranked)
    assert json.loads((out / "refreshes" / "000001" / "drift.json").read_text())["drift"] == done.drift.drift
    assert done.drift.drift > 0
    status = open_run(out).status()
    assert (status.shards, status.samples, status.pending, status.finished) == (5, 20, 0, True)


def test_data_that_has_gained_nothing(model: Path, add: Callable[..., None], tmp_path: Path) -> None:
    add(0)
    out = tmp_path / "run"
    census_here(model, str(tmp_path / "data"), out, shard_size=4)
    done = refresh(out)
    assert (done.new_samples, done.drift, done.outcome.samples) == (0, None, 4)
    assert not (out / "refreshes").exists()


def test_one_refresh_after_the_other(model: Path, add: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "run"
    add(0)
    census_here(model, str(tmp_path / "data"), out, shard_size=3)
    for number in (1, 2):
        add(number)
        done = refresh(out)
        assert (done.new_samples, done.outcome.samples) == (4, 4 + 4 * number)
    # The census itself knows the run again, and what it does not know it says how to take in.
    again = census_here(model, str(tmp_path / "data"), out, shard_size=3)
    assert again.samples == 12
    add(3)
    with pytest.raises(InputError, match=rf"holds a run of other data; .*mmray refresh {out}$"):
        census_here(model, str(tmp_path / "data"), out, shard_size=3)
    samples = open_run(out).table("captions")["sample_id"].to_pylist()
    assert len(samples) == len(set(samples)) == 12


def test_a_limit_holds_for_all_that_comes(model: Path, add: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "run"
    add(0)
    census_here(model, str(tmp_path / "data"), out, shard_size=3, limit=6)
    add(1)
    assert refresh(out).new_samples == 2
    add(2)
    assert refresh(out).new_samples == 0


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_data_that_was_analysed_must_stay(model: Path, add: Callable[..., None], tmp_path: Path, change: str) -> None:
    out = tmp_path / "run"
    add(0, 1)
    census_here(model, str(tmp_path / "data"), out, shard_size=4)
    before = {name: found for name, found in files(out).items() if not name.startswith("lease/")}
    add(2)
    if change == "gone":
        (tmp_path / "data" / "0.parquet").unlink()
    else:
        (tmp_path / "data" / "2.parquet").replace(tmp_path / "data" / "0.parquet")
    with pytest.raises(InputError, match=r"0\.parquet (is gone|has changed) since it was analysed"):
        refresh(out)
    assert {name: found for name, found in files(out).items() if not name.startswith("lease/")} == before


def grow(form: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows, or these and more after them, as an image folder or COCO; return what DATA is."""
    if form == "coco":
        return write_coco(folder, rows)
    return (write_jsonl if form == "jsonl" else write_csv)(folder, rows).parent


FORMS = ["jsonl", "csv", "coco"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_rows_at_the_end_of_a_file_are_new_data(model: Path, tmp_path: Path, form: str) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    rows = scenes(9)
    uri = str(grow(form, data, rows[:5]))
    census_here(model, uri, out, shard_size=3)
    committed = {name: found for name, found in files(out).items() if name.startswith(("shards/", "receipts/"))}
    for count in (7, 9):
        grow(form, data, rows[:count])
        # The census names the command that takes them in, and that does.
        with pytest.raises(InputError, match=rf"add what is new: mmray refresh {out}$"):
            census_here(model, uri, out, shard_size=3)
        done = refresh(out)
        assert (done.new_samples, done.outcome.samples, done.outcome.complete) == (2, count, True)
        assert refresh(out).new_samples == 0
    assert {name: found for name, found in files(out).items() if name in committed} == committed
    # The run is that of all data, and the census knows it again.
    assert census_here(model, uri, out, shard_size=3).already
    census_here(model, uri, tmp_path / "whole", shard_size=3)
    # Batches are of other samples, and so numbers differ by rounding.
    for name, columns in {"captions": ["sample_id", "caption"], "occurrences": ["sample_id", "concept"]}.items():
        ours, theirs = (by_sample(open_run(folder).table(name)) for folder in (out, tmp_path / "whole"))
        assert ours.select(columns).equals(theirs.select(columns)), name


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["caption", "order", "fewer", "image", "objects"])
def test_rows_that_were_analysed_must_stay(model: Path, tmp_path: Path, form: str, change: str) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    rows = scenes(7)
    census_here(model, str(grow(form, data, rows[:5])), out, shard_size=3)
    now = [dict(row) for row in rows]
    if change == "caption":
        now[2]["caption"] = "A dog."
    elif change == "order":
        now[1], now[2] = now[2], now[1]
    elif change == "fewer":
        now = now[:4]
    elif change == "objects":
        now[0] |= {"objects": ["dog"], "boxes": [[0.0, 0.0, 1.0, 1.0]]}
    grow(form, data, now)
    if change == "image":
        picture = min(data.rglob("*.jpg"))
        picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"has changed since it was analysed.*begin another run in another OUT$"):
        refresh(out)


def test_a_manifest_of_an_earlier_version_is_read_and_its_file_may_not_grow(model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    census_here(model, str(grow("jsonl", data, scenes(3))), out, shard_size=3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["files"][0]) == 5
    manifest["files"][0].pop()
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert refresh(out).new_samples == 0
    grow("jsonl", data, scenes(4))
    with pytest.raises(InputError, match="begin another run in another OUT"):
        refresh(out)


def test_another_model_is_no_refresh(model: Path, add: Callable[..., None], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    out = tmp_path / "run"
    add(0)
    census_here(copy, str(tmp_path / "data"), out)
    (copy / "generation_config.json").write_text('{"_from_model_config": true, "max_length": 7}')
    add(1)
    with pytest.raises(InputError, match="other model"):
        refresh(out)


def test_paths_are_those_of_the_call_that_began_it(
    model: Path, add: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    add(0)
    census_here(model, "data", "run", shard_size=4)
    add(1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert refresh(Path("../run")).new_samples == 4
    assert Path.cwd() == tmp_path / "elsewhere"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        refresh(tmp_path / "run")


@pytest.mark.slow
def test_a_refresh_may_die_at_any_moment(
    model: Path, add: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill it before each of its changes, and once more on its way out; the next one makes it good, once."""
    add(0)
    first = tmp_path / "first"
    census_here(model, str(tmp_path / "data"), first, shard_size=4)
    add(1)
    expected: dict[str, pa.Table] = {}
    drifts = set()
    monkeypatch.setattr(job, "load_model", cache(job.load_model))
    for change in range(1000):
        out = tmp_path / f"run-{change}"
        copy_of(first, out)
        died = killed_before(change, out)
        done = refresh(out)
        run = open_run(out)
        drifts.add((out / "refreshes" / "000001" / "drift.json").read_text())
        assert not (out / "refreshes" / "000002").exists()
        assert done.outcome.samples == 8
        for name in TABLES:
            assert run.table(name).equals(expected.setdefault(name, run.table(name))), (name, change)
        if not died:
            assert change > 20
            assert len(drifts) == 1
            return
    raise AssertionError("the refresh never came to its end")


def copy_of(run: Path, out: Path) -> None:
    import shutil

    shutil.copytree(run, out)


def killed_before(change: int, out: Path) -> bool:
    """Refresh the run until its n-th change; return whether that came."""
    with dying(change):
        try:
            refresh_run(str(out), local=True)
        except Killed:
            return True
    return False


def test_only_new_samples_are_run(model: Path, add: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "run"
    add(0, 1)
    census_here(model, str(tmp_path / "data"), out, shard_size=4)
    add(2)
    shards: list[int] = []
    analyse = ShardAnalysis.collect

    def run(self: ShardAnalysis, samples: Any) -> None:
        shards.append(self.shard_id)
        analyse(self, samples)

    with patch.object(ShardAnalysis, "collect", run):
        refresh(out)
    assert shards == [2]
