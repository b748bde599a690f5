"""Done, skipped or failed: what each outcome is, says, and leads to as the exit status."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import PIL.Image
import pytest

from mmray.features.census.view import status as status_view
from mmray.runs import Receipt
from mmray.runs.failures import reasons
from mmray.runs.run import open_run
from tests.support.command import Answer
from tests.support.scenes import scenes, write
from tests.support.terminal import shown

Mmray = Callable[..., Answer]
Rows = list[dict[str, object]]
NOUNLESS = "!!!"


@pytest.fixture
def census(mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Answer]:
    """Return what takes a census of rows, `tmp_path / "run"`, in shards of four."""

    def take(rows: Rows, *options: object) -> Answer:
        data = write(tmp_path / "data" / "0.parquet", rows)
        folder = Path(data).parent
        common = ["--model", tiny("llava"), "--data", folder, "--out", tmp_path / "run", "--shard-size", 4]
        return mmray("census", "--local", *common, *options)

    return take


def nounless(count: int, of: int) -> Rows:
    rows = scenes(of)
    for row in rows[:count]:
        row["caption"] = NOUNLESS
    return rows


def test_captions_without_a_noun_are_skipped_and_no_failure(
    census: Callable[..., Answer], mmray: Mmray, tmp_path: Path
) -> None:
    answer = census(nounless(3, 10), "--nouns", "textblob")
    assert answer.status == 0, answer.err
    assert "3 of 10 captions have no noun; see --nouns\n" in answer.out
    assert "failed" not in answer.out
    run_folder = tmp_path / "run"
    assert answer.out.endswith(f"next: mmray rank {run_folder} · mmray status {run_folder}\n")
    run = open_run(tmp_path / "run")
    # They are in everything that needs no noun.
    assert run.table("captions")["caption"].to_pylist().count(NOUNLESS) == 3
    assert len(run.table("errors")) == 0
    assert len(run.table("captions")) == 10
    # Where they are counted: per shard, in all, and in what is said of the run.
    receipts = list(run.folder.receipts().values())
    assert [receipt.skipped for receipt in receipts] == [{"no noun": 3}, {}, {}]
    assert run.status().finished
    status = mmray("status", run.uri)
    assert "skipped   3 of 10 captions have no noun" in status.out
    assert json.loads(mmray("status", run.uri, "--json").out)["skipped"] == {"no noun": 3}


def test_a_census_again_says_that_it_was_finished(census: Callable[..., Answer]) -> None:
    rows = nounless(1, 4)
    first, second = census(rows, "--nouns", "textblob"), census(rows, "--nouns", "textblob")
    assert (first.status, second.status) == (0, 0)
    assert "already" not in first.out
    assert second.out.startswith("4 samples already finished → ")
    assert "1 of 4 captions has no noun; see --nouns\n" in second.out
    found = json.loads(census(rows, "--nouns", "textblob", "--json").out)
    assert (found["already"], found["skipped"], found["failures"]) == (True, {"no noun": 1}, 0)


def test_a_lexicon_of_few_nouns_fails_nothing(census: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "nouns.txt").write_text("zeppelin\n")
    answer = census(scenes(5), "--nouns", tmp_path / "nouns.txt")
    assert answer.status == 0
    assert "5 of 5 captions have no noun; see --nouns\n" in answer.out
    # There is no concept to look at next.
    assert "next:" not in answer.out


def test_a_census_of_unreadable_rows_ends_with_4_and_no_hint(census: Callable[..., Answer], tmp_path: Path) -> None:
    rows = scenes(1)
    rows[0]["image"] = {"bytes": b"no picture", "path": None}
    answer = census(rows)
    assert answer.status == 4
    first, second = answer.out.splitlines()
    assert first.startswith("1 sample in ")
    assert second == f"1 sample failed; see: mmray status {tmp_path / 'run'}"


def test_receipts_of_earlier_versions_are_read(census: Callable[..., Answer], tmp_path: Path) -> None:
    census(nounless(2, 5), "--nouns", "textblob")
    store = open_run(tmp_path / "run").folder.store
    for entry in store.list("receipts/"):
        receipt = json.loads(store.read(entry.key))
        assert receipt.pop("skipped") is not None
        store.put(entry.key, json.dumps(receipt).encode())
    run = open_run(tmp_path / "run")
    assert [receipt.skipped for receipt in run.folder.receipts().values()] == [{}, {}]
    assert run.status().skipped == {}
    assert set(asdict(Receipt(0))) == {*receipt, "skipped"}


def test_a_refresh_answers_for_what_it_analysed(census: Callable[..., Answer], mmray: Mmray, tmp_path: Path) -> None:
    """A failure of the census is not one of every refresh after it."""
    rows = nounless(1, 10)
    rows[1]["image"] = {"bytes": b"no picture", "path": None}
    assert census(rows[:4], "--nouns", "textblob").status == 4
    nothing = mmray("refresh", "--local", tmp_path / "run")
    assert (nothing.status, nothing.out.count("\n")) == (0, 1)
    write(tmp_path / "data" / "1.parquet", rows[4:8])
    good = mmray("refresh", "--local", tmp_path / "run", "--json")
    assert good.status == 0
    found = json.loads(good.out)
    assert (found["new_samples"], found["failures"], found["skipped"], found["samples"]) == (4, 0, {}, 8)
    rows[8]["image"] = {"bytes": b"no picture", "path": None}
    rows[9]["caption"] = NOUNLESS
    write(tmp_path / "data" / "2.parquet", [rows[8], rows[9]])
    bad = mmray("refresh", "--local", tmp_path / "run")
    assert bad.status == 4
    assert "2 new samples in " in bad.out
    assert "1 of 2 captions has no noun" in bad.out
    assert "1 sample failed; see: mmray status" in bad.out
    assert mmray("refresh", "--local", tmp_path / "run").status == 0
    status = open_run(tmp_path / "run").status()
    assert (status.failures, status.skipped) == (2, {"no noun": 2})


def test_a_refresh_that_was_stopped_answers_for_its_shards_alone(
    census: Callable[..., Answer], mmray: Mmray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmray.features.census.shard import ShardAnalysis

    rows = scenes(8)
    rows[0]["image"] = {"bytes": b"no picture", "path": None}
    assert census(rows[:4]).status == 4
    write(tmp_path / "data" / "1.parquet", rows[4:])
    analyse = ShardAnalysis.collect

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardAnalysis, "collect", interrupt)
    assert mmray("refresh", "--local", tmp_path / "run").status == 130
    monkeypatch.setattr(ShardAnalysis, "collect", analyse)
    assert mmray("refresh", "--local", tmp_path / "run").status == 0
    assert open_run(tmp_path / "run").status().samples_done == 8


def test_status_groups_what_failed_by_reason(census: Callable[..., Answer], mmray: Mmray, tmp_path: Path) -> None:
    rows = scenes(9)
    for number in range(5):
        # Pictures that are cut short at different places, for one reason.
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (64, 64)).save(buffer, "BMP")
        rows[number]["image"] = {"bytes": buffer.getvalue()[: 400 + number], "path": None}
    rows[5]["caption"] = ""
    assert census(rows).status == 4
    out = mmray("status", tmp_path / "run").out
    (line,) = " ".join(out.split()).split("5 × decode: ")[1:]
    assert line.startswith("0.parquet#0, 0.parquet#1, 0.parquet#2 and 2 more: image can't be read")
    assert "read: 0.parquet#5: no caption" in " ".join(out.split())
    found = json.loads(mmray("status", tmp_path / "run", "--json").out)
    assert [len(reason["sources"]) for reason in found["reasons"]] == [5, 1]


def test_many_reasons_are_cut_and_counted(census: Callable[..., Answer], tmp_path: Path) -> None:
    census(scenes(2))
    failures = [
        {"stage": f"stage{letter}", "source": f"row {number}", "message": f"no image '{number}.png' of {number}"}
        for letter in "abcdefghijklm"
        for number in range(3)
    ]
    assert [len(reason.sources) for reason in reasons(failures)] == [3] * 13
    text = "\n".join(shown(status_view(open_run(tmp_path / "run").status(), failures, "run"), 200))
    assert "3 × stagea: row 0, row 1, row 2: no image '0.png' of 0" in text
    assert "and 9 more for 3 other reasons: see the table errors" in text
