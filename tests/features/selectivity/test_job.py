"""`mmray selectivity` from a run to its tables, in this process: the driver and the workers are the real ones."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmray.data.samples import Failure, Sample
from mmray.data.shards import Shard, read_shard
from mmray.data.source import Source
from mmray.demo import DATA
from mmray.errors import InputError, ShardError
from mmray.features.census import run_samples
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import selectivity_settings
from mmray.features.selectivity.tables import TABLES
from mmray.runs.lease import hold_lease
from mmray.runs.run import open_run
from mmray.storage import open_store
from tests.support.command import Answer
from tests.support.local_jobs import census_here

SCENES = 24


QUICK: dict[str, Any] = {"permutations": 2, "bootstraps": 2, "batch_size": 20, "local": True}


def analysed(run: Path, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    outcome = run_selectivity(selectivity_settings({"run": str(run), **QUICK, **settings}))
    assert not outcome.quarantined
    return {name: rows.to_pylist() for name, rows in outcome.tables.items()}


@pytest.fixture(scope="module")
def run(own_census: Callable[..., Path]) -> Path:
    return own_census(SCENES, shard_size=10, module="vision", label_column=["background"])


@pytest.mark.parametrize("settings", [{}, {"count": "image"}, {"by": "domain", "module": "vision"}])
def test_the_pass_chooses_what_the_census_s_own_table_does(run: Path, settings: dict[str, Any]) -> None:
    counted = analysed(run, permutations=0, bootstraps=0, **settings)
    passed = analysed(run, **settings)
    assert [row["union"] for row in passed["selective_labels"]] == [row["union"] for row in counted["selective_labels"]]
    for name in ("samples", "tokens", "label"):
        assert [row[name] for row in passed["selective_labels"]] == [row[name] for row in counted["selective_labels"]]
    one, other = ({(row["label"], row["neuron"]) for row in some["selectivity"]} for some in (passed, counted))
    # A gate within rounding of zero may count in one of them.
    assert len(one & other) >= 0.95 * len(one | other)
    assert all(row["p_value"] is None for row in counted["selectivity"])
    assert all(1 / 3 <= row["p_value"] <= 1 for row in passed["selectivity"])
    assert all(0 <= row["stability"] <= 1 for row in passed["selectivity"])


def test_how_the_data_was_cut_changes_nothing(run: Path, tmp_path: Path) -> None:
    census_here("demo", "demo", tmp_path / "other", limit=SCENES, shard_size=24)
    settings: dict[str, Any] = {"method": "contribution", "rate": 0.02}
    one, other = analysed(run, **settings), analysed(tmp_path / "other", **settings)
    names = [[(row["label"], row["neuron"]) for row in found["selectivity"]] for found in (one, other)]
    assert set(names[0]) == set(names[1])
    for row, same in zip(one["selective_labels"], other["selective_labels"], strict=True):
        assert row["cut"] == pytest.approx(same["cut"], rel=1e-3)
        assert row["chance"] == pytest.approx(same["chance"], abs=2)


def test_any_column_labels_samples(run: Path) -> None:
    found = analysed(run, by="background", permutations=0, bootstraps=0)["selective_labels"]
    backgrounds = pq.read_table(DATA, columns=["background"])["background"].to_pylist()[:SCENES]
    assert {row["label"]: row["samples"] for row in found} == {b: backgrounds.count(b) for b in backgrounds}


def test_tests_see_what_the_selection_did_not(run: Path) -> None:
    tests: dict[str, Any] = {"interventions": True, "stages": True, "steer": "en:es", "questions": 0}
    found = analysed(run, method="contribution", rate=0.05, held_out=0.4, **tests)
    sizes = {row["label"]: row["samples"] for row in found["selective_labels"]}
    measured = {row["label"]: row["n"] for row in found["interventions"] if row["measure"] == "nll"}
    captions = open_run(run).table("captions").to_pylist()
    for label, size in sizes.items():
        assert size + measured.get(label, 0) == sum(row["language"] == label for row in captions)
    rows = [row for row in found["interventions"] if row["measure"] == "nll"]
    assert {row["control"] for row in rows} <= {"selected", "random", "shuffled"}
    for row in rows:
        assert row["after"] == pytest.approx(row["before"] + row["change"])
        assert row["low"] <= row["change"] + 1e-12
        assert row["change"] <= row["high"] + 1e-12
    sizes_by_mask = {(row["masked"], row["control"]): row["neurons"] for row in rows}
    for (masked, control), size in sizes_by_mask.items():
        assert control != "random" or size == sizes_by_mask[masked, "selected"]
    own = next(row for row in rows if (row["masked"], row["control"], row["label"]) == ("en", "selected", "en"))
    random = next(row for row in rows if (row["masked"], row["control"], row["label"]) == ("en", "random", "en"))
    assert own["change"] > 0.3 > 5 * abs(random["change"])
    assert len(found["steering"]) == measured["en"]
    assert {row["label_before"] for row in found["steering"]} == {"en"}
    layers = {row["layer"] for row in found["stages"]}
    assert layers == set(range(8))


def test_what_lape_chooses_can_be_steered_by(run: Path) -> None:
    (first, *_) = analysed(run, steer="en:es", steer_neurons="chosen", steer_values="mean")["steering"]
    assert first["steering"].startswith("chosen neurons set to 2 × their mean over answers, at the answer's positions")


def files(run: Path) -> set[Path]:
    """Return all files but those of leases: what is written anew has another name, but for copies of tables."""
    return {file for file in run.rglob("*") if file.is_file() and file.parent.name != "lease"}


def test_an_analysis_goes_on_where_it_was_and_leaves_others_alone(run: Path) -> None:
    first = analysed(run, rate=0.02)
    before = files(run)
    assert analysed(run, rate=0.02) == first
    assert files(run) == before
    assert analysed(run, rate=0.03)["selectivity"] != first["selectivity"]
    written = {file.relative_to(run).parts[0] for file in files(run) ^ before}
    assert written == {"snapshots"}, "another rate needs no pass over the samples"
    analysed(run, by="domain", permutations=0, bootstraps=0)
    kinds = open_run(run).table("selectivity")["label_kind"].to_pylist()
    assert {"language", "domain"} <= set(kinds)


def kinds(run: Path) -> set[str]:
    return set(open_run(run).table("selectivity")["label_kind"].to_pylist())


def test_rows_of_all_analyses_are_one_snapshot(run: Path) -> None:
    quick: dict[str, Any] = {"permutations": 0, "bootstraps": 0}
    analysed(run, by="domain", **quick)
    # What other tools read is a copy.
    (run / "tables/selectivity.parquet").unlink()
    analysed(run, by="background", **quick)
    assert kinds(run) >= {"domain", "background"}
    copy = run / "tables/selectivity.parquet"
    written = copy.read_bytes()
    copy.unlink()
    analysed(run, by="background", **quick)
    assert copy.read_bytes() == written
    assert pq.read_table(copy).equals(open_run(run).table("selectivity"))


def test_rows_that_an_earlier_version_wrote_stay(run: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"permutations": 0, "bootstraps": 0}
    analysed(run, by="domain", **quick)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/snapshots/selectivity")
    before = files(tmp_path / "run")
    analysed(tmp_path / "run", by="domain", **quick)
    assert files(tmp_path / "run") == before
    analysed(tmp_path / "run", by="language", rate=0.04, **quick)
    assert kinds(tmp_path / "run") == {"domain", "language"} | kinds(run)


def test_a_damaged_table_is_told_and_made_anew(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick: dict[str, Any] = {"permutations": 0, "bootstraps": 0}
    found = analysed(run, by="domain", **quick)
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run/snapshots/selectivity").rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="run mmray selectivity again"):
        open_run(tmp_path / "run").table("selectivity")
    assert analysed(tmp_path / "run", by="domain", **quick) == found
    assert "selectivity/00000.parquet" in caplog.text
    assert "run those again, too" in caplog.text
    assert kinds(tmp_path / "run") == {"domain"}
    for name in TABLES:
        open_run(tmp_path / "run").optional(name)


def test_measures_of_other_neurons_leave_the_tables(run: Path) -> None:
    settings: dict[str, Any] = {"method": "contribution", "rate": 0.02, "held_out": 0.25, "questions": 0}
    analysed(run, **settings, interventions=True, stages=True)  # as the next test has them: measured once
    measured = open_run(run).table("interventions").to_pylist()
    analysed(run, **settings, steer="en:es")  # the same neurons: both stay
    assert open_run(run).table("interventions").to_pylist() == measured
    assert len(open_run(run).table("steering"))
    analysed(run, **settings | {"rate": 0.03})

    def left(name: str) -> list[dict[str, Any]]:
        rows = open_run(run).table(name).to_pylist()
        return [row for row in rows if (row["label_kind"], row["method"]) == ("language", "contribution")]

    assert any(row["method"] == "contribution" for row in measured)
    assert left("interventions") == left("steering") == []
    assert left("selectivity")


@pytest.mark.parametrize("method", ["contribution", "lape"])
def test_reading_again_leaves_what_was_measured(run: Path, method: str) -> None:
    settings: dict[str, Any] = {"method": method, "rate": 0.02, "held_out": 0.25, "questions": 0}
    tested = analysed(run, **settings, interventions=True, stages=True)
    assert analysed(run, **settings)["selectivity"] == tested["selectivity"]
    analysed(run, **settings, permutations=0, bootstraps=0)
    for name in ("interventions", "stages"):
        rows = [row for row in open_run(run).table(name).to_pylist() if row["method"] == method]
        assert [row for row in rows if row["label_kind"] == "language"] == tested[name]


def test_what_is_no_longer_true_is_told(run: Path, command: Callable[..., Answer]) -> None:
    settings = ("--held-out", 0.4, "--permutations", 0, "--bootstraps", 0, "--json", "--local")
    assert "stages" not in command("selectivity", run, *settings, "--rate", 0.021, "--stages").err
    assert "stages" not in command("selectivity", run, *settings, "--rate", 0.021).err
    again = command("selectivity", run, *settings, "--rate", 0.031)
    assert "mmray: stages: removed, because other neurons are chosen now; run these tests again" in again.err
    assert "stages" not in json.loads(again.out)


def test_shards_quarantined_are_told_and_not_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(shards: set[int]) -> Callable[[Source, Shard], Iterator[Sample | Failure]]:
        def read(source: Source, shard: Shard) -> Iterator[Sample | Failure]:
            if shard.shard_id in shards:
                raise ShardError("CUDA out of memory")
            return read_shard(source, shard)

        return read

    quick = {**QUICK, "run": str(run), "permutations": 1, "bootstraps": 0, "method": "contribution"}
    with monkeypatch.context() as patched:
        patched.setattr(run_samples, "read_shard", breaks({0, 1, 2}))
        with pytest.raises(InputError, match=r"nothing was counted; shard 0 was quarantined: .*out of memory"):
            run_selectivity(selectivity_settings({**quick, "seed": 1}))
    with monkeypatch.context() as patched:
        patched.setattr(run_samples, "read_shard", breaks({1}))
        outcome = run_selectivity(selectivity_settings({**quick, "seed": 2}))
    assert list(outcome.quarantined) == [1]
    captions = open_run(run).table("captions").to_pylist()
    counted = Counter(row["language"] for row in captions if row["shard_id"] != 1)
    assert {row["label"]: row["samples"] for row in outcome.tables["selective_labels"].to_pylist()} == counted


def test_two_calls_do_not_mix_their_rows(run: Path) -> None:
    with hold_lease(open_store(f"{run}/selectivity")), pytest.raises(InputError, match="another driver is at work"):
        analysed(run)


def test_balance_gives_labels_like_token_budgets(run: Path) -> None:
    plain, balanced = (analysed(run, balance=balance)["selective_labels"] for balance in (False, True))
    spread = [max(row["tokens"] for row in rows) / min(row["tokens"] for row in rows) for rows in (plain, balanced)]
    assert spread[0] > 3 > 1.7 > spread[1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"by": "mood"}, "--by mood: no sample has that label; the run has background, domain, language"),
        ({"steer": "en:xx"}, "--steer en:xx: no label 'xx' in en, es, fr, zh"),
        ({"module": "qformer-text"}, "--module qformer-text: it has no MLP"),
        ({"samples": 1}, "is left to select from"),
        ({"steer": "en:es", "rate": 1e-4, "held_out": 0.4}, "no neuron of 'es' was chosen; give a higher --rate"),
        (
            {"balance": True, "module": "projector"},
            "the census counted no image tokens of --module projector",
        ),
    ],
)
def test_bad_input_is_one_line(run: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        analysed(run, **settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"steer": "en"}, "write FROM:TO"),
        ({"method": "contribution", "module": "vision"}, "write no token"),
        ({"steer": "en:es", "module": "vision"}, "leave --module out"),
        ({"rate": 2.0}, "setting rate = 2.0"),
        ({"steer": "en:en"}, "the labels are the same"),
        ({"method": "contribution", "count": "image"}, "leave --count out"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        selectivity_settings({"run": "none", **settings})


@pytest.mark.slow
def test_text_without_images(tmp_path: Path) -> None:
    words = pq.read_table(DATA, columns=["caption", "language"]).slice(0, SCENES).rename_columns(["text", "language"])
    pq.write_table(words, tmp_path / "corpus.parquet")
    census_here("demo", str(tmp_path / "corpus.parquet"), tmp_path / "run", nouns="textblob", prompt="")
    for method in ("lape", "contribution"):
        found = analysed(tmp_path / "run", method=method, rate=0.05, held_out=0.4, interventions=True)
        assert {row["label"] for row in found["selectivity"]} == {"en", "es", "fr", "zh"}
        assert {row["measure"] for row in found["interventions"]} == {"nll", "perplexity"}
    for controls in ({}, {"permutations": 0, "bootstraps": 0}):
        with pytest.raises(InputError, match="no token of this kind was counted"):
            analysed(tmp_path / "run", count="image", **controls)


@pytest.fixture
def command(mmray: Callable[..., Answer]) -> Callable[..., Answer]:
    return mmray


def test_the_command(run: Path, command: Callable[..., Answer]) -> None:
    quick = ("--permutations", 0, "--bootstraps", 0)
    table_only = (*quick, "--seed", 7)  # no other test has tested this choice
    told = command("selectivity", run, *table_only)
    assert (told.status, told.err) == (0, "")
    assert "by language · lape · language · text tokens · 82 neurons in all" in told.out
    found = json.loads(command("selectivity", run, "--json", *table_only).out)
    assert {row["union"] for row in found["selective_labels"]} == {82}
    assert "--by mood: no sample has that label" in command("selectivity", run, "--by", "mood").refusal
    tests = ("--interventions", "--stages", "--steer", "en:es")
    tested = command("selectivity", run, "--local", *tests, "--held-out", 0.2, *quick)
    assert tested.status == 0
    assert "change · nats per token, held-out texts" in tested.out
    assert "captions read like es" in tested.out
    assert "logit lens" in tested.out
