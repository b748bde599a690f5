"""Whatever happens to a file of a run or its analyses, --verify names it, and what it says has the file made again."""

import json
import shutil
from pathlib import Path

import pytest

from mmray.runs import RunFolder
from mmray.runs.verification import verify_run
from tests.support.damage import CONTENTS, PLACES


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {"flipped": flipped, "cut": lambda data: data[:-9], "empty": lambda _: b"", "gone": None}


def checked_files(census):
    """Return the files that are checked byte by byte, of the analysis and of the census."""
    root = Path(census)
    return sorted(
        [
            *root.glob("letters/*/shards/*/*.parquet"),
            *root.glob("snapshots/letters/*/*/*.parquet"),
            root / "tables/letters.parquet",
            *root.glob("shards/000001/*.parquet"),
            *root.glob("decoding/*/shards/*/*.parquet"),
            *root.glob("snapshots/census/*/*/*.parquet"),
        ]
    )


def problems(census):
    return {Path(problem.path): problem for problem in verify_run(RunFolder.at(census)).problems}


def damage(path, kind):
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))


def test_a_whole_run_has_no_problems(mmray, census, count):
    count()
    found = verify_run(RunFolder.at(census))
    assert (found.problems, found.foreign) == ((), ())
    read = [path for path in Path(census).rglob("*.parquet") if "refreshes" not in path.parts]
    receipts = list(Path(census).rglob("receipts/*.json"))
    assert found.files >= len(read) + len(receipts)
    answer = mmray("status", census, "--verify")
    assert answer.status == 0
    assert "all as they were written" in answer.out


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damaged_file_is_named_alone(census, count, kind):
    count()
    files = checked_files(census)
    assert len(files) > 25
    for path in files:
        whole = path.read_bytes()
        damage(path, kind)
        assert set(problems(census)) == {path}
        path.write_bytes(whole)
    assert not problems(census)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["receipts/000003.json", "run.json", "manifest.json", "snapshot", "census"])
def test_every_damaged_note_is_named(census, count, kind, name):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    path = begun.parent / name
    if name == "snapshot":
        (path,) = Path(census, "snapshots/letters").glob("*.json")
    elif name == "census":
        path = Path(census, "receipts/000001.json")
    damage(path, kind)
    # An analysis without run.json, and a snapshot without its list, are none.
    if kind != "gone" or name not in ("run.json", "snapshot"):
        assert path in problems(census)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_said_makes_the_file_again(mmray, census, count, kind):
    count()
    before = {path: path.read_bytes() for path in Path(census).glob("tables/*")}
    root = Path(census)
    targets = [
        next(root.glob("letters/*/shards/000002/*-counts.parquet")),
        next(root.glob("snapshots/letters/*/*/*.parquet")),
        root / "tables/letters.parquet",
    ]
    for path in targets:
        damage(path, kind)
    found = problems(census)
    assert set(found) == set(targets)
    for problem in found.values():
        assert problem.command == f"mmray letters {census}"
        if problem.remove:
            Path(problem.remove).unlink(missing_ok=True)
    count()
    # The version of the tables that was damaged is an earlier one now, for comparison only.
    for path, problem in problems(census).items():
        assert (path, problem.command) == (targets[1], "")
        Path(problem.remove).unlink()
    assert not problems(census)
    assert {path: path.read_bytes() for path in Path(census).glob("tables/*")} == before


def test_damage_is_a_line_each_and_status_3(mmray, census, count):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    (part,) = begun.parent.glob("shards/000002/*-counts.parquet")
    damage(part, "flipped")
    receipt = Path(census, "receipts/000000.json")
    receipt.unlink()
    answer = mmray("status", census, "--verify")
    assert (answer.status, answer.err) == (3, "")
    lines = answer.out.splitlines()
    (line,) = [line for line in lines if line.startswith(str(part))]
    remove = begun.parent / "receipts/000002.json"
    assert line == (
        f"{part}: changed since it was written (another SHA-256); remove {remove}, then run: mmray letters {census}"
    )
    (line,) = [line for line in lines if line.startswith(str(receipt))]
    assert "gone; run: mmray census" in line and f"--out={census}" in line and "--shard-size=10" in line
    answer = mmray("status", census, "--verify", "--json")
    assert answer.status == 3
    assert len(json.loads(answer.out)["verified"]["problems"]) == 2


def test_a_part_of_another_unit_is_none_of_this_one(census, count):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    parts = [next(begun.parent.glob(f"shards/{unit:06d}/*-counts.parquet")) for unit in (1, 2)]
    shutil.copy(parts[0], parts[1])
    assert set(problems(census)) == {parts[1]}


def test_foreign_files_are_named_and_are_no_damage(mmray, census, count):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    foreign = [Path(census, "receipts/notes.txt"), begun.parent / "shards/x", Path(census, "snapshots/letters/x.json")]
    for path in foreign:
        path.write_text("mine")
    Path(census, "notes.txt").write_text("nobody minds")
    answer = mmray("status", census, "--verify")
    assert answer.status == 0
    named = [line.split(": ")[0] for line in answer.out.splitlines() if "not written by mmray" in line]
    assert sorted(named) == sorted(map(str, foreign))


def test_a_run_that_cannot_be_counted_is_verified_all_the_same(mmray, census):
    receipt = Path(census, "receipts/000001.json")
    receipt.write_bytes(b"{")
    assert receipt.name in mmray("status", census).refusal
    answer = mmray("status", census, "--verify")
    assert (answer.status, answer.err) == (3, "")
    assert f"{receipt}: not a receipt, or a truncated one; remove {receipt}, then run: mmray census" in answer.out


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("place", [*PLACES, "snapshots/x.json"])
def test_nothing_that_lies_in_a_run_is_a_traceback(census, count, place, content):
    count()
    (begun,) = Path(census, "letters").glob("*/run.json")
    path = begun.parent / place
    if place == "lease":
        (path,) = Path(census, "letters/lease").glob("*.json")
    elif place == "snapshot":
        (path,) = Path(census, "snapshots/letters").glob("*.json")
    elif not path.parent.parent.is_dir():
        path = Path(census, place)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    verify_run(RunFolder.at(census))
