"""What status tells of a run's analyses, tried on a toy that has a line in the table of features."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from mmray.cli import status as cli
from mmray.cli.job import command_line
from mmray.engine import LocalExecutor, UnitResult
from mmray.engine.clock import phase
from mmray.runs import RunFolder
from mmray.runs.analyses import find_analyses
from mmray.runs.driver import drive_analysis
from mmray.runs.receipts import AROUND
from mmray.runs.run import Run, open_run
from mmray.runs.status import analyses
from mmray.runs.tables import ERRORS
from tests.support.damage import CONTENTS, PLACES
from tests.support.letters import LINES
from tests.support.local_jobs import properties_here


def test_a_command_says_what_is_not_the_default():
    settings = {"run": "old", "images": 40, "local": True, "seed": 0, "retry_failed": True, "detector": None}
    command = command_line("mmray saliency RUN", {"run": "new run"}, settings)
    assert command == "mmray saliency 'new run' --images=40 --local"
    # Settings of a step say nothing about the file of the whole.
    assert command_line("mmray pipeline FILE", {"run": "r"}, {"run": "r", "name": "x"}) == "mmray pipeline FILE"


def fail(unit):
    if "b1" in unit.payload:
        raise RuntimeError("no luck")


def stop_at(line):
    def stop(unit):
        if line in unit.payload:
            raise KeyboardInterrupt

    return stop


def analyses_of(census):
    return analyses(RunFolder.at(census), open_run(census))


def only(census):
    (found,) = analyses_of(census)
    return found


def test_nothing_is_said_of_analyses_where_there_are_none(mmray, census):
    assert "analysis" not in mmray("status", census).out
    assert json.loads(mmray("status", census, "--json").out)["analyses"] == []


def test_a_finished_analysis(mmray, census, count):
    count()
    found = only(census)
    assert (found.units, found.units_done, found.pending, found.size, found.size_done) == (10, 10, 0, 95, 95)
    assert (found.tables, found.damage, found.quarantined) == ("current", (), {})
    assert found.driver.state == "ended"
    assert found.cost.memory["host"] > 1e6
    out = mmray("status", census).out
    assert "95 of 95 lines" in out
    assert "go on with" not in out and "renew" not in out
    (told,) = json.loads(mmray("status", census, "--json").out)["analyses"]
    assert (told["name"], told["units_done"], told["pending"], told["tables"]) == ("letters", 10, 0, "current")


def test_a_stopped_analysis(mmray, census, count, hook):
    hook(stop_at("a30"))
    with pytest.raises(KeyboardInterrupt):
        count()
    found = only(census)
    assert (found.units_done, found.pending, found.size_done, found.tables) == (3, 7, 30, "not made")
    out = mmray("status", census).out
    assert "7 units" in out
    assert f"letters: not finished; resume with: mmray letters {census}" in out
    hook(lambda _: None)
    count()
    assert only(census).tables == "current"


def test_a_quarantined_unit_is_told_with_its_reason(mmray, census, count, hook):
    hook(fail)
    count()
    assert only(census).quarantined == {0: "given up after 3 attempts: RuntimeError: no luck"}
    assert "unit 0 quarantined: given up after 3 attempts: RuntimeError: no luck" in mmray("status", census).out


def test_failed_samples_are_told_with_their_reasons(mmray, census, count, monkeypatch):
    monkeypatch.setattr(
        "tests.support.words.UnitResult",
        lambda tables: UnitResult(tables | {"errors": pa.Table.from_pylist([error()], schema=ERRORS)}),
    )
    numbers = itertools.count()

    def error():
        number = next(numbers)
        message = f"letter {number} is smudged" if number else "torn"
        return {"source": f"line {number}", "stage": "decode", "message": message}

    count()
    assert [(one.message, len(one.sources)) for one in only(census).reasons] == [
        ("letter 1 is smudged", 9),
        ("torn", 1),
    ]
    out = mmray("status", census).out
    assert "letters: 9 × decode: line 1, line 2, line 3 and 6 more: letter 1 is smudged" in out
    assert "letters: decode: line 0: torn" in out
    (told,) = json.loads(mmray("status", census, "--json").out)["analyses"]
    assert told["reasons"][1] == {"stage": "decode", "message": "torn", "sources": ["line 0"]}


def test_tables_that_lack_a_part_are_older_than_the_parts(mmray, census, count, hook):
    hook(fail)
    done = count()
    assert only(census).tables == "current"
    late = done.parts.folder.read_part(done.parts.receipts[1], "counts")
    errors = done.parts.folder.read_part(done.parts.receipts[1], "errors")
    done.parts.folder.commit_shard(0, {"counts": late, "errors": errors}, 10, 1.0)
    assert only(census).tables == "older than the parts"
    assert f"tables older than the parts; renew them: mmray letters {census}" in mmray("status", census).out
    count()
    assert only(census).tables == "current"


def test_tables_of_an_earlier_census_are_stale_until_they_are_made_again(mmray, census, count, monkeypatch):
    count()
    monkeypatch.setattr(Run, "digests", lambda self: {"run": "r", "receipts": "grown"})
    assert only(census).tables == "older than the census"
    assert f"tables older than the census; renew them: mmray letters {census}" in mmray("status", census).out
    count()
    now, before = analyses_of(census)
    assert (now.tables, before.tables) == ("current", "of other settings")


def test_finished_work_of_other_settings_is_a_number(mmray, census, count, hook):
    count(upper=True)
    count()
    out = mmray("status", census).out
    assert out.count("95 of 95 lines") == 1
    assert "and 1 finished with other settings" in out
    assert "renew" not in out
    # Unless something about it is left to be done.
    hook(stop_at("a30"))
    with pytest.raises(KeyboardInterrupt):
        count(text=str(shorter(census)))
    out = mmray("status", census).out
    assert out.count("95 of 95 lines") == 1
    assert "30 of 40 lines" in out


def shorter(census):
    path = Path(census).parent / "shorter.txt"
    path.write_text("\n".join(LINES[:40]))
    return path


def test_who_drives_an_analysis(mmray, census, count):
    count()
    with drive_analysis(f"{census}/letters"):
        assert only(census).driver.state == "at work"
        assert "process" in mmray("status", census).out
    assert only(census).driver.state == "ended"


def test_edits_have_analyses_of_their_own(census, count):
    count()
    shutil.copytree(f"{census}/letters", f"{census}/edits/dog-cat/letters")
    titles = [found.title for found in find_analyses(open_run(census).folder.store)]
    assert titles == ["decoding", "letters", "letters of dog-cat"]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_file_is_a_line_that_names_it(mmray, census, count, place, content):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    path = begun.parent / place
    if place == "lease":
        (path,) = Path(census, "letters/lease").glob("*.json")
    if place == "snapshot":
        (path,) = Path(census, "snapshots/letters").glob("*.json")
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    answer = mmray("status", census)
    assert (answer.status, answer.err) == (0, "")
    may_be_gone = content is None and place in ("run.json", "receipts/000000.json", "aside/000001.json", "snapshot")
    if place != "lease" and not may_be_gone:
        assert path.name in answer.out
    assert json.loads(mmray("status", census, "--json").out)["finished"]


def test_watching_prints_a_line_per_change_and_ends_when_all_is_done(mmray, census, count, hook, monkeypatch):
    hook(stop_at("a30"))
    with pytest.raises(KeyboardInterrupt):
        count()
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            hook(lambda _: None)
            count()

    monkeypatch.setattr(cli.time, "sleep", pause)
    answer = mmray("status", census, "--watch")
    assert len(pauses) == 2
    first, last = answer.out.splitlines()
    assert "letters 30 of 95 lines" in first
    assert "letters" not in last
    assert answer.status == 0


def test_watching_ends_with_ctrl_c(mmray, census, count, hook, monkeypatch):
    hook(stop_at("a30"))
    with pytest.raises(KeyboardInterrupt):
        count()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", interrupt)
    answer = mmray("status", census, "--watch", "--json")
    assert answer.status == 0
    assert json.loads(answer.out)["analyses"][0]["pending"] == 7


def test_status_needs_neither_torch_nor_ray(census, count):
    count()
    code = (
        "import sys; from mmray.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "status", census]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_a_worker_that_loses_an_answer_leaves_its_unit_pending(census, count, monkeypatch):
    """What status counts is what storage holds, not what a driver heard."""
    real = RunFolder.commit_shard
    monkeypatch.setattr(LocalExecutor, "run", lambda self, order, groups: iter(()))
    with pytest.raises(Exception, match="neither committed nor quarantined"):
        count()
    assert only(census).pending == 10
    assert RunFolder.commit_shard is real


def orphan(folder):
    """Leave the part of an attempt at unit 0 that came too late, and return it."""
    path = folder / "shards/000000/0badcafe-counts.parquet"
    path.write_bytes(b"late")
    return path


def contents(census):
    files = (path for path in Path(census).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if not {"lease", "attempts"} & set(path.parts)}


def test_a_sweep_takes_orphans_of_analyses_and_nothing_else(mmray, census, count):
    count()
    count(upper=True)
    before = contents(census)
    late = [orphan(begun.parent) for begun in Path(census, "letters").glob("*/run.json")]
    half = Path(census, "snapshots/letters/.tmp-half")
    half.write_bytes(b"half")
    os.utime(half, (1, 1))
    answer = mmray("status", census, "--sweep")
    assert answer.status == 0
    assert len(late) == 2
    assert "swept" in answer.out
    assert contents(census) == before
    assert not list(Path(census, "letters").glob("*/attempts/*/*"))
    assert mmray("status", census, "--sweep").out.startswith("swept 0 objects")


def test_a_job_at_work_is_not_swept_and_the_others_are(mmray, census, count):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    late = [orphan(begun.parent), orphan(Path(census))]
    with drive_analysis(f"{census}/letters"):
        answer = mmray("status", census, "--sweep")
    assert answer.status == 4
    assert f"not swept: {census}/letters: another driver is at work" in answer.out
    assert [path.exists() for path in late] == [True, False]
    assert mmray("status", census, "--sweep").status == 0
    assert not late[0].exists()


def test_where_time_and_memory_went(mmray, census, count, hook):
    def work(unit):
        with phase("read"):
            time.sleep(0.03)
        with phase("forward"):
            time.sleep(0.01)

    hook(work)
    count()
    found = only(census)
    assert {"read", "forward", *AROUND} == set(found.cost.phases)
    assert 0.3 <= found.cost.phases["read"] <= found.cost.seconds
    *_, line = (line for line in mmray("status", census).out.splitlines() if "per worker" in line)
    shares = {name: int(share) for name, share in re.findall(r"(\w+) (\d+)%", line)}
    assert shares["read"] > shares["forward"] > 0
    assert abs(sum(shares.values()) - 100) <= 2
    assert "GB of host memory" in line


def test_notes_of_units_are_told_once(mmray, census, count, monkeypatch):
    commit = RunFolder.commit_shard
    monkeypatch.setattr(
        RunFolder,
        "commit_shard",
        lambda *call, **named: commit(*call[:8], ["one thing", f"unit {call[1] % 2}"], **named),
    )
    count()
    assert only(census).cost.notes == ("one thing", "unit 0", "unit 1")
    out = mmray("status", census).out
    assert out.count("slower: one thing") == 1


def test_measuring_a_model_is_told_by_phase(census):
    properties_here(census, concepts=1, images=2, maps=1)
    (found,) = analyses_of(census)
    assert {"read", "decode", "forward"} <= set(found.cost.phases)
    within = [seconds for name, seconds in found.cost.phases.items() if name not in AROUND]
    assert sum(within) <= found.cost.seconds + 0.001 * len(within)  # each is rounded to milliseconds


def test_a_folder_that_is_no_run_has_a_status_too(mmray, census, count, tmp_path):
    """An edit has evaluations, say; the folder of a job that keeps its units in OUT is an analysis itself."""
    count()
    edit, out = tmp_path / "edit", tmp_path / "out"
    shutil.copytree(f"{census}/letters", edit / "letters")
    (begun,) = Path(census, "letters").glob("*/run.json")
    shutil.copytree(begun.parent, out)
    for folder in (edit, out):
        answer = mmray("status", folder, "--verify", "--sweep")
        assert (answer.status, answer.err) == (0, "")
        assert "95 of 95 lines" in answer.out
        assert "shards" not in answer.out
        (told,) = json.loads(mmray("status", folder, "--json").out)["analyses"]
        assert told["units_done"] == 10
        assert mmray("status", folder, "--watch").status == 0
    next(out.glob("shards/000001/*-counts.parquet")).write_bytes(b"")
    assert mmray("status", out, "--verify").status == 3
    assert "no run here" in mmray("status", tmp_path).refusal
