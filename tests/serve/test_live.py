"""A served page shows what the report shows; SQL reads the tables and nothing else."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pytest

from mmray.errors import InputError
from mmray.report.content import Content, gather
from mmray.runs import run as reading
from mmray.serve import live as pages
from mmray.serve.live import LiveRun
from mmray.storage import open_store
from tests.support.earlier_run import earlier_run


@pytest.fixture(scope="module", params=["whole", "in pieces", "s3", "earlier version"])
def live(dogs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[LiveRun]:
    """The run with its tables read whole; with only the rows read that match, on disk and S3; as 0.1.0 left it."""
    uri, whole = str(dogs), reading.WHOLE
    if request.param == "s3":
        uri = f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
        store = open_store(uri)
        for file in filter(Path.is_file, dogs.rglob("*")):
            store.put(str(file.relative_to(dogs)), file.read_bytes())
    elif request.param == "earlier version":
        uri = str(earlier_run(dogs, tmp_path_factory.mktemp("earlier") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "WHOLE", 0 if request.param in ("in pieces", "s3") else whole)
        found = LiveRun(uri)
        yield found
        found.catalog.close()


@pytest.fixture(scope="module")
def content(live: LiveRun) -> Content:
    return gather(live.run)


def test_pages_of_concepts_are_the_reports(live: LiveRun, content: Content) -> None:
    for name, page in list(content.concepts.items())[:12]:
        found = live.part(f"c:{name}")
        assert found is not None
        assert found[0] == page
        assert found[1] == {row["id"]: content.captions[row["id"]] for row in page["samples"]}


def test_pages_of_neurons_are_the_reports(live: LiveRun, content: Content) -> None:
    for name, page in list(content.neurons.items())[:12]:
        found = live.part(f"n:{name}")
        assert found is not None
        # A report lists the concepts that it has a page for; here they are all that rank the neuron.
        assert {key: value for key, value in found[0].items() if key != "concepts"} == {
            key: value for key, value in page.items() if key != "concepts"
        }
        ranked = live.run.table("rankings").filter(pc.field("neuron") == name)
        expected = sorted(zip(ranked["rank"].to_pylist(), ranked["concept"].to_pylist(), strict=True))[:15]
        assert sorted((row["rank"], row["name"]) for row in found[0]["concepts"])[:3] == expected[:3]


def test_layers_and_the_index_are_the_reports(live: LiveRun, content: Content) -> None:
    assert live.part("layers:") == (content.index["layers"], {})
    index = live.index["index"]
    for name in set(content.index) - {"concepts", "neurons", "layers"}:
        assert index[name] == content.index[name], name
    rows = {row["name"]: row for row in content.index["concepts"]}
    for row in index["concepts"]:
        own = rows[row["name"]]
        assert {key: value for key, value in row.items() if key not in ("sample", "specific")}.items() <= own.items()


def test_a_frequent_concept_is_shown_by_its_first_occurrences(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    name, count = next(iter(live.run.concepts.items()))
    monkeypatch.setattr(pages, "OCCURRENCES", count - 1)
    found = live.part(f"c:{name}")
    assert found is not None
    assert found[0]["n"] == count
    rows = [row for row in live.run.table("occurrences").to_pylist() if row["concept"] == name][: count - 1]
    expected = sum(pc.exp(row["log_prob"]).as_py() for row in rows) / len(rows)
    assert found[0]["probability"] == pytest.approx(expected, rel=1e-3)


def test_sql_answers_with_rows_that_json_can_hold(live: LiveRun) -> None:
    found = live.sql("select neuron, 'nan'::float as nothing, tokens from neurons where layer = 0 and unit = 1")
    assert found["columns"] == ["neuron", "nothing", "tokens"]
    assert found["rows"] == [["L0.u1", None, live.run.neuron("L0.u1")["tokens"]]]
    many = live.sql("select * from activity")
    assert len(many["rows"]) == pages.ROWS
    assert many["more"]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "selec 1",
        "select 1; select 2",
        "copy neurons to '{0}/out.csv'",
        "create table a as select 1",
        "attach '{0}/a.db'",
        "set memory_limit = '100GB'",
        "set enable_external_access = true",
        "install httpfs",
        "select * from read_text('{0}/secret')",
        "select * from read_csv('{0}/secret')",
        "select * from '{0}/secret'",
        "select * from glob('{0}/*')",
        "select * from live",
    ],
)
def test_sql_reads_the_tables_and_nothing_else(live: LiveRun, query: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"^SQL: ") as caught:
        live.sql(query.format(tmp_path))
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


def test_a_query_that_takes_too_long_is_stopped(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SECONDS", 0.3)
    with pytest.raises(InputError, match="stopped after"):
        live.sql("select sum(a.range * b.range) from range(10000000) a, range(10000000) b")
