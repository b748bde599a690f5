"""Few rows of a large table are found without reading the rest, and are those that reading all of it gives."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mmray.errors import InputError
from mmray.runs import run as reading
from mmray.runs import snapshots, tables
from mmray.runs.run import Run, open_run
from mmray.runs.snapshots import Snapshot, SnapshotWriter
from mmray.runs.tables import ordered
from mmray.storage import Store

SCHEMA = ordered([("concept", pa.string()), ("rank", pa.int64()), ("note", pa.string())], "concept", "rank")
CONCEPTS = [f"noun {number:03d}" for number in range(60)]


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WHOLE", 0)
    monkeypatch.setattr(tables, "ROW_GROUP", 1_000)
    monkeypatch.setattr(snapshots, "FILE_BYTES", 10_000)


def written(store: Store) -> tuple[Snapshot, pa.Table]:
    """Write a table in parts, and return its snapshot and all its rows."""
    rows = [
        {"concept": concept, "rank": rank, "note": f"{concept} {rank} {rank**7}"}
        for concept in CONCEPTS
        for rank in range(1, 41)
    ]
    whole = pa.Table.from_pylist(rows, schema=SCHEMA)
    writer = SnapshotWriter(store, "census", 1)
    for first in range(0, len(whole), 100):
        writer.add("rankings", whole.slice(first, 100))
    writer.commit({}, {})
    opened = snapshots.newest(store, "census")
    assert opened is not None
    return opened, whole


def asked(snapshot: Snapshot, store: Store, concept: str) -> pa.Table:
    return snapshot.dataset(store, "rankings", SCHEMA).to_table(filter=pc.field("concept") == concept)


@pytest.mark.usefixtures("in_small_pieces")
def test_few_rows_are_those_of_the_whole_table(store: Store) -> None:
    snapshot, whole = written(store)
    files = snapshot.tables["rankings"]
    assert len(files) > 5
    assert [file.bounds["concept"] for file in files] == sorted(file.bounds["concept"] for file in files)
    assert all(before.bounds["concept"][1] <= after.bounds["concept"][0] for before, after in pairwise(files))
    assert snapshot.read(store, "rankings") == whole
    for concept in (CONCEPTS[0], CONCEPTS[31], CONCEPTS[-1], "no such noun"):
        assert asked(snapshot, store, concept) == whole.filter(pc.equal(whole["concept"], concept))


def test_columns_that_an_earlier_version_lacked_are_null(store: Store) -> None:
    snapshot, whole = written(store)
    found = snapshot.dataset(store, "rankings", SCHEMA.append(pa.field("new", pa.int64()))).to_table()
    assert found["new"].null_count == len(whole)
    assert found.drop_columns("new").sort_by("note") == whole.sort_by("note")


@pytest.mark.usefixtures("in_small_pieces")
def test_files_without_the_rows_are_not_even_opened(store: Store) -> None:
    snapshot, whole = written(store)
    last = snapshot.tables["rankings"][-1]
    for file in snapshot.tables["rankings"][1:-1]:
        store.delete(file.key)
    (expected,) = (whole.filter(pc.equal(whole["concept"], name)) for name in CONCEPTS[-1:])
    assert last.bounds["concept"][0] < CONCEPTS[-1]
    assert asked(snapshot, store, CONCEPTS[-1]) == expected


@pytest.mark.usefixtures("in_small_pieces")
def test_a_page_that_is_read_is_checked_and_no_other(store: Store) -> None:
    snapshot, whole = written(store)
    file = snapshot.tables["rankings"][0]
    data = bytearray(store.read(file.key))
    data[200] ^= 1  # in a page of the first row group, which holds the first concept alone
    store.put(file.key, bytes(data))
    with pytest.raises(OSError, match="CRC"):
        asked(snapshot, store, CONCEPTS[0])
    later = file.bounds["concept"][1]
    assert later > CONCEPTS[1]
    assert asked(snapshot, store, later) == whole.filter(pc.equal(whole["concept"], later))


def answers(run: Run) -> list[object]:
    concept = next(iter(run.concepts))
    ranked = run.rank(concept, 5)
    return [
        ranked.to_pylist(),
        run.rank(concept, 300, "share").to_pylist(),
        run.concept_table("specific").to_pylist(),
        [run.neuron(name) for name in ranked["neuron"].to_pylist()],
        run.sql(f"select * from rankings where concept = '{concept}' order by rank").to_pylist(),
        run.sql("select layer, count(*), max(activation) from examples group by layer order by layer").to_pylist(),
    ]


def test_a_large_run_answers_like_a_small_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(open_run(run.uri))
    monkeypatch.setattr(reading, "WHOLE", 0)
    large = open_run(run.uri)
    assert answers(large) == expected
    # Nothing was read whole.
    assert not large._tables.keys() - {"concepts"}


def test_a_run_of_an_earlier_version_answers_from_its_rankings(run: Run) -> None:
    earlier = open_run(run.uri)
    for name in ("concepts", "neuron_concepts"):
        del earlier._snapshots[name]
    assert answers(earlier) == answers(open_run(run.uri))


def test_a_neuron_has_the_concepts_of_the_rankings(run: Run) -> None:
    columns = run.table("neuron_concepts").column_names
    keys = [(name, "ascending") for name in ("layer", "unit", "rank", "concept")]
    assert run.table("neuron_concepts").sort_by(keys) == run.table("rankings").select(columns).sort_by(keys)
    ordered = run.table("neuron_concepts").select(["layer", "unit", "rank"]).to_pylist()
    assert ordered == sorted(ordered, key=lambda row: (row["layer"], row["unit"], row["rank"]))


def test_a_damaged_large_table_is_named_with_what_makes_it_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WHOLE", 0)
    opened = open_run(run.uri)
    snapshot = opened.snapshot
    assert snapshot is not None

    def gone(*_: object) -> None:
        raise FileNotFoundError("rankings/00000.parquet")

    monkeypatch.setattr(Snapshot, "dataset", gone)
    with pytest.raises(InputError, match=r"table rankings: rankings/00000\.parquet; run mmray census .* again"):
        opened.rank("dog")
