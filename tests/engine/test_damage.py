"""Whatever is damaged, exchanged or foreign in a job's folders is named in one line and never merged.

The same command makes it good, at once or at its next call. The toy has every damage, the others have a few.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mmray.errors import InputError
from mmray.runs.receipts import Receipt
from mmray.storage import Checksum
from tests.engine.jobs import CASES, Case, Place
from tests.engine.suite import Suite, each

TOY, OTHERS = CASES[0], CASES[1:]
Damage = Callable[[Path], object]
"""Damages something below a folder."""


def flip(file: Path) -> None:
    """Change one bit, far from both ends."""
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    replace(file, bytes(data))


def cut(file: Path) -> None:
    replace(file, file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    replace(file, b"")


def remove(file: Path) -> None:
    file.unlink()


def replace(file: Path, data: bytes) -> None:
    """Give a file other contents; what shares its old ones, in the place that this was copied from, keeps them."""
    file.unlink()
    file.write_bytes(data)


def change(file: Path, **values: object) -> None:
    replace(file, json.dumps(json.loads(file.read_text()) | values).encode())


def receipt(parts: Path, unit: int) -> Path:
    return parts / f"receipts/{unit:06d}.json"


def part(parts: Path, unit: int, name: str) -> Path:
    known = Receipt.from_json(receipt(parts, unit).read_bytes()).parts
    assert known is not None
    return parts / known[name]


def own_part(parts: Path, unit: int) -> Path:
    """Return a part of a unit that the job itself makes; of a job without any, that of errors."""
    known = Receipt.from_json(receipt(parts, unit).read_bytes()).parts
    assert known is not None
    return parts / known[min(known, key=lambda name: (name == "errors", name))]


def last_unit(parts: Path) -> int:
    """Return the unit that is damaged: the second, where there is one."""
    return int(receipt(parts, 1).exists())


def exchange(parts: Path) -> None:
    """Put a unit's part in the place of another's."""
    replace(own_part(parts, 1), own_part(parts, 0).read_bytes())


def exchange_all(parts: Path) -> None:
    for name in ("counts", "errors"):
        replace(part(parts, 1, name), part(parts, 0, name).read_bytes())


def flip_all(parts: Path) -> None:
    """Flip a bit in each part of a unit: no merge reads them all."""
    unit = last_unit(parts)
    for name in Receipt.from_json(receipt(parts, unit).read_bytes()).parts or {}:
        flip(part(parts, unit, name))


def copied_receipt(parts: Path) -> None:
    replace(receipt(parts, 1), receipt(parts, 0).read_bytes())


def receipt_of_another_run(parts: Path) -> None:
    change(receipt(parts, 1), run="another")


def receipt_of_an_unknown_unit(parts: Path) -> None:
    text = receipt(parts, 1).read_text().replace("shards/000001", "shards/000099")
    shutil.copytree(parts / "shards/000001", parts / "shards/000099")
    receipt(parts, 99).write_text(text.replace('"shard_id": 1', '"shard_id": 99'))
    receipt(parts, 1).unlink()


def receipt_with_parts_of_another_unit(parts: Path) -> None:
    text = receipt(parts, 0).read_text().replace('"shard_id": 0', '"shard_id": 1')
    replace(receipt(parts, 1), text.encode())


def receipt_without_parts(parts: Path) -> None:
    change(receipt(parts, 1), parts=None)


def no_receipt_at_all(parts: Path) -> None:
    replace(receipt(parts, 1), b"[1, 2]")


def cut_quarantine(parts: Path) -> None:
    (parts / "aside").mkdir()
    (parts / "aside/000001.json").write_text('{"shard_')
    receipt(parts, 1).unlink()


def cut_attempt(parts: Path) -> None:
    receipt(parts, 1).unlink()
    (attempt,) = (parts / "attempts/000001").iterdir()
    cut(attempt)


def of_part(damage: Callable[[Path], None]) -> Damage:
    def of(parts: Path) -> None:
        damage(own_part(parts, last_unit(parts)))

    of.__name__ = f"{damage.__name__}_part"
    return of


def of_receipt(damage: Callable[[Path], None]) -> Damage:
    def of(parts: Path) -> None:
        damage(receipt(parts, last_unit(parts)))

    of.__name__ = f"{damage.__name__}_receipt"
    return of


PARTS = [*map(of_part, (flip, cut, empty, remove)), exchange, exchange_all]
RECEIPTS = [
    *map(of_receipt, (cut, empty, remove)),
    copied_receipt,
    receipt_of_another_run,
    receipt_of_an_unknown_unit,
    receipt_with_parts_of_another_unit,
    receipt_without_parts,
    no_receipt_at_all,
    cut_quarantine,
    cut_attempt,
]
UNNAMED = [RECEIPTS[2], cut_attempt]
"""What leaves nothing behind that could be named."""


def forget_tables(target: Path, name: str) -> None:
    """Remove what a job has merged: it is to be merged again, from the parts."""
    for snapshot in (target / "snapshots" / name).glob("*.json"):
        for table in json.loads(snapshot.read_text())["tables"]:
            (target / f"tables/{table}.parquet").unlink(missing_ok=True)
    shutil.rmtree(target / "snapshots" / name, ignore_errors=True)


def check_damage(suite: Suite, case: Case, damage: Damage, *, merged: bool = False) -> str:
    """Damage something of a finished job, and call it again until it is good, twice at most; return the refusal."""
    place = suite.place()
    suite.run(case, place)
    job, refused = case.make(place), ""
    if not merged:
        forget_tables(Path(job.target), job.name)
    damage(case.parts_folder(place))
    try:
        result = suite.run(case, place)
    except InputError as refusal:
        refused = str(refusal)
        assert "\n" not in refused
        assert "run the same command again" in refused
        result = suite.run(case, place)
    suite.check(case, place, result)
    return refused


def by_name(damages: Iterable[Damage]) -> Any:
    """Return a test's parameters: these damages."""
    return pytest.mark.parametrize("damage", damages, ids=lambda damage: damage.__name__)


@by_name([*PARTS, *RECEIPTS])
def test_damage_is_named_and_made_good(suite: Suite, damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    refused = check_damage(suite, TOY, damage)
    told = refused + caplog.text
    assert damage in UNNAMED or re.search(r"(receipts|aside)/0000(01|99)\.json is removed", told)
    if damage in (*PARTS[:1], exchange, exchange_all):
        # Exchanged parts of different sizes are noticed before the merge, and their unit is done again.
        assert "parquet: " in told


@by_name(RECEIPTS)
def test_a_damaged_receipt_of_a_finished_job(suite: Suite, damage: Damage) -> None:
    check_damage(suite, TOY, damage, merged=True)


@each(case for case in OTHERS if case.merges)
def test_a_flipped_bit_of_another_job_is_never_merged(suite: Suite, case: Case) -> None:
    assert re.search(r"-\w+\.parquet: .*receipts/00000.\.json is removed", check_damage(suite, case, flip_all))


@each(OTHERS)
@by_name([PARTS[1], RECEIPTS[2]])
def test_a_cut_part_or_lost_receipt_of_another_job(suite: Suite, case: Case, damage: Damage) -> None:
    check_damage(suite, case, damage)


def test_checksums_that_nobody_compares_would_be_noticed(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.reference(TOY)
    for name in ("check", "check_size"):
        monkeypatch.setattr(Checksum, name, lambda *_: None)
    with pytest.raises(AssertionError):
        check_damage(suite, TOY, exchange)


def tables_of(place: Place, pattern: str) -> Path:
    """Return the file of the toy's table of letters that a pattern names."""
    (file,) = Path(TOY.make(place).target).glob(pattern)
    return file


@by_name([flip, cut, empty, remove])
@pytest.mark.parametrize("pattern", ["tables/letters.parquet", "snapshots/letters/*/letters/00000.parquet"])
def test_a_damaged_table_is_made_again(suite: Suite, damage: Damage, pattern: str) -> None:
    place, again = suite.place(), suite.executor(TOY)
    suite.run(TOY, place)
    damage(tables_of(place, pattern))
    suite.check(TOY, place, TOY.run(place, again))
    assert not again.seen


@by_name([cut, empty, remove])
def test_a_damaged_snapshot_is_made_again(suite: Suite, damage: Damage) -> None:
    place, again = suite.place(), suite.executor(TOY)
    suite.run(TOY, place)
    damage(tables_of(place, "snapshots/letters/*.json"))
    suite.check(TOY, place, TOY.run(place, again))
    assert not again.seen


@by_name([cut, empty])
def test_what_a_job_is_can_not_be_made_up(suite: Suite, damage: Damage) -> None:
    place = suite.place()
    suite.run(TOY, place)
    damage(TOY.parts_folder(place) / "run.json")
    with pytest.raises(InputError, match=r"run\.json: not written by mmray; give another folder$"):
        suite.run(TOY, place)


def test_files_of_others_are_left_alone(suite: Suite) -> None:
    place = suite.place()
    suite.run(TOY, place)
    parts, target = TOY.parts_folder(place), Path(TOY.make(place).target)
    folders = [parts, target, target / "letters", target / "letters/lease", target / "tables", target / "snapshots"]
    folders += [parts / name for name in ("receipts", "attempts", "attempts/000001", "aside", "shards/000001")]
    strangers = [folder / name for folder in folders for name in (".DS_Store", "notes.txt")]
    for file in strangers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\x00\x01")
    receipt(parts, 1).unlink()
    suite.check(TOY, place, suite.run(TOY, place))
    assert all(file.exists() for file in strangers)


def test_a_receipt_of_a_later_version_is_read(suite: Suite) -> None:
    place, again = suite.place(), suite.executor(TOY)
    suite.run(TOY, place)
    for file in (TOY.parts_folder(place) / "receipts").iterdir():
        change(file, invented_later={"x": 1})
    suite.check(TOY, place, TOY.run(place, again))
    assert not again.seen
