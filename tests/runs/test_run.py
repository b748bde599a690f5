"""What a run answers: tables as the contract has them, rankings in three orders, neurons, SQL, status."""

import subprocess
import sys
import textwrap

import pyarrow.compute as pc
import pytest

from mmray.errors import InputError
from mmray.features.census.tables import TABLES
from mmray.runs import run as module
from mmray.runs.concepts import ORDERS
from mmray.runs.run import Run, open_run
from mmray.storage import open_store

CONTRACT = {
    "captions": "sample_id, caption, source, language, domain, shard_id, labels, image, token_spans, text_start, "
    "image_spans",
    "occurrences": "sample_id, concept, token, token_id, position, log_prob, neurons",
    "rankings": "concept, rank, layer, unit, neuron, score, score_std, specific, specific_rank, n, share, activation, "
    "tokens, certified, selective, selective_rank, n_images, certified_specific, certified_selective, exact",
    "neurons": "layer, unit, neuron, n_concepts, n_tokens, n_active, mean, std, max, min, tokens, suppressed",
    "activity": "label_kind, label, modality, layer, unit, n_tokens, n_active, sum, sum_squares, module",
    "examples": "layer, unit, sign, rank, sample_id, position, activation, shard_id",
    "errors": "sample_id, source, shard_id, stage, message",
    "concepts": "concept, n, n_images, highest_score, highest_specific, highest_selective, highest_share, "
    "score, specific",
    "neuron_concepts": "layer, unit, concept, rank, score, specific, specific_rank, selective, share, n, activation",
}


def test_reading_a_run_loads_neither_torch_nor_ray(run: Run) -> None:
    code = f"""
        import sys, mmray
        run = mmray.open_run({run.uri!r})
        concept = next(iter(run.concepts))
        rows = run.rank(concept)
        run.neuron(rows["neuron"][0].as_py())
        run.status(), run.failures()
        run.sql("select count(*) from occurrences")
        import mmray.cli, mmray.terminal.progress, mmray.cli.models
        import mmray.features.census.view
        print(sorted({{"torch", "ray", "transformers", "torchvision"}} & set(sys.modules)))
    """
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize("name", CONTRACT)
def test_tables_have_the_columns_of_the_contract(run: Run, name: str) -> None:
    table = run.table(name)
    assert table.schema.names == CONTRACT[name].split(", ")
    assert table.schema.types == TABLES[name].types
    assert len(table)


def test_there_are_no_other_tables(run: Run) -> None:
    assert set(TABLES) == set(CONTRACT)
    with pytest.raises(InputError, match="unknown table 'ranking'; a run has captions, occurrences, rankings"):
        run.table("ranking")


def test_units_of_columns_are_kept(run: Run) -> None:
    fields = {field.name: field.metadata for field in run.table("occurrences").schema}
    assert fields["log_prob"] == {b"unit": b"nat"}


@pytest.mark.parametrize(
    ("by", "column", "sign"), [(name, name, -1) for name in ("score", "specific", "selective", "share")]
)
def test_rankings_are_in_the_order_asked_for(run: Run, by: str, column: str, sign: int) -> None:
    for concept in run.concepts:
        rows = run.rank(concept, k=1000, by=by)
        assert set(rows["concept"].to_pylist()) == {concept}
        values = rows[column].to_pylist()
        assert values == sorted(values, reverse=sign < 0)
        ranks = rows["rank"].to_pylist()
        if by == "share":
            pairs = list(zip([-value for value in values], ranks, strict=True))
            assert pairs == sorted(pairs)
        first = run.rank(concept, k=3, by=by)
        assert first.equals(rows.slice(0, 3))


def test_every_order_is_tested() -> None:
    assert set(ORDERS) == {"score", "specific", "selective", "share"}


def test_a_concept_is_found_in_any_case(run: Run) -> None:
    concept = next(iter(run.concepts))
    assert run.rank(concept.upper()).equals(run.rank(concept))


def test_an_unknown_concept_names_near_ones(run: Run) -> None:
    concept = max(run.concepts, key=len)
    with pytest.raises(InputError, match=rf"no concept '{concept}x'.* it has .*{concept}"):
        run.rank(f"{concept}x")
    with pytest.raises(InputError, match="choose from score, specific, selective, share"):
        run.rank(concept, by="rank")


def test_sql_sees_every_table(run: Run) -> None:
    for name in TABLES:
        counted = run.sql(f"SELECT count(*) AS n FROM {name.upper()}")
        assert counted["n"].to_pylist() == [len(run.table(name))], name
    joined = run.sql(
        "select c.caption, o.concept from occurrences o join captions c using (sample_id) order by o.sample_id"
    )
    assert len(joined) == len(run.table("occurrences"))
    assert all(row["concept"] in row["caption"].casefold() for row in joined.to_pylist())


def test_sql_needs_only_the_tables_that_it_names(run: Run) -> None:
    """Not those whose name is part of another word, which the run may lack."""
    assert run.sql("select count(*) as my_answers from rankings")["my_answers"].to_pylist() != [0]


@pytest.mark.parametrize("query", ["select nothing from rankings", "selec", "select * from '/etc/passwd'"])
def test_bad_sql_is_one_line(run: Run, query: str) -> None:
    with pytest.raises(InputError, match=r"^SQL: .+$") as failure:
        run.sql(query)
    assert "\n" not in str(failure.value)


def test_a_neuron_is_described_by_the_tables(run: Run) -> None:
    row = run.rank(next(iter(run.concepts)), 1).to_pylist()[0]
    facts = run.neuron(row["neuron"])
    (of_table,) = [known for known in run.table("neurons").to_pylist() if known["neuron"] == row["neuron"]]
    assert {name: facts[name] for name in of_table} == of_table
    ranked = [other for other in run.table("rankings").to_pylist() if other["neuron"] == row["neuron"]]
    assert sorted(concept["concept"] for concept in facts["concepts"]) == sorted(other["concept"] for other in ranked)
    assert [concept["rank"] for concept in facts["concepts"]] == sorted(other["rank"] for other in ranked)
    captions = {known["sample_id"]: known["caption"] for known in run.table("captions").to_pylist()}
    highest = [example for example in facts["examples"] if example["sign"] == 1]
    assert [example["rank"] for example in highest] == [1, 2, 3, 4, 5]
    assert highest[0]["activation"] == pytest.approx(facts["max"])
    assert all(example["caption"] == captions[example["sample_id"]] for example in facts["examples"])
    activations = [example["activation"] for example in highest]
    assert activations == sorted(activations, reverse=True)


@pytest.mark.parametrize("name", ["L0", "l0.u1", "0.1", "L0.u-1", "", "L0.u1x"])
def test_names_that_are_no_neurons(run: Run, name: str) -> None:
    with pytest.raises(InputError, match=r"is not a neuron; write layer and unit as L7\.u89"):
        run.neuron(name)


@pytest.mark.parametrize("name", ["L99.u0", "L0.u99999"])
def test_neurons_outside_the_model(run: Run, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is outside the model: 2 layers"):
        run.neuron(name)


def test_status_adds_up(run: Run) -> None:
    status = run.status()
    assert (status.shards, status.shards_done, status.pending, status.quarantined) == (3, 3, 0, {})
    assert (status.samples, status.samples_done, status.failures, status.finished) == (24, 24, 2, True)
    assert status.failures == len(run.table("errors"))
    assert status.samples_per_second == pytest.approx(24 / status.seconds)
    assert sorted(row["stage"] for row in run.failures()) == ["decode", "read"]
    assert len(run.failures(limit=1)) == 1


def test_a_run_that_has_not_ended(run: Run, tmp_path: object) -> None:
    store = open_store(f"{tmp_path}/run")
    store.put("run.json", run.folder.store.read("run.json"))
    begun = open_run(f"{tmp_path}/run")
    assert begun.status().pending == 3
    assert not begun.status().finished
    with pytest.raises(InputError, match="no table 'rankings' yet; the census has not ended"):
        begun.rank("dog")


def test_a_printed_run_says_what_was_analysed(run: Run, tmp_path: object) -> None:
    printed, most_frequent = repr(run), next(iter(run.concepts))
    assert printed.splitlines()[0] == f"Run {run.uri}"
    assert f"{len(run.concepts):,}, most frequent {most_frequent}, " in printed
    assert all(name in printed for name in run.tables)
    assert f"<td>{most_frequent}</td>" in run._repr_html_()
    store = open_store(f"{tmp_path}/run")
    store.put("run.json", run.folder.store.read("run.json"))
    begun = open_run(f"{tmp_path}/run")
    assert begun.tables == []
    assert "has not ended" in repr(begun)
    assert "has not ended" in begun._repr_html_()


@pytest.mark.parametrize("whole", [0, 1 << 30])
def test_a_scan_has_the_rows_of_the_table(run: Run, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    monkeypatch.setattr(module, "WHOLE", whole)
    fresh = open_run(run.uri)
    assert set(fresh.tables) >= {"rankings", "neurons", "captions"}
    rows = fresh.scan("rankings").to_table(columns=["neuron"], filter=pc.field("rank") == 1)
    assert rows.num_rows == len(run.concepts)
    with pytest.raises(InputError, match="unknown table 'ranking'"):
        fresh.scan("ranking")


@pytest.mark.parametrize("name", ["nowhere", "file", "file/below"])
def test_folders_without_a_run(tmp_path: object, name: str) -> None:
    open_store(str(tmp_path)).put("file", b"")
    with pytest.raises(InputError, match=rf"{name}: no run here .*; give a folder that mmray census wrote"):
        open_run(f"{tmp_path}/{name}")
