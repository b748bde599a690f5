"""What is damaged in a run's folder is named in one line, never merged, and made good by the same command."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmray.engine import Progress
from mmray.errors import InputError
from mmray.features.census.job import CensusResult
from mmray.features.census.tables import PARTS, TABLES
from mmray.runs import RunFolder
from mmray.runs.lease import this_process
from mmray.runs.run import open_run
from mmray.runs.tables import read_table
from mmray.storage import open_store
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

SIZES = {"shard_size": 2, "top_k": 3}


@pytest.fixture(scope="module")
def whole(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a finished run of three shards: leave it as it is."""
    root = tmp_path_factory.mktemp("corruption")
    data = write(root / "data.parquet", scenes(6))
    assert census_here(tiny("llava"), str(data), root / "run", **SIZES).complete
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(whole / "run", tmp_path / "run"))


@pytest.fixture
def again(tiny: Callable[[str], Path], whole: Path, run: Path) -> Callable[[], None]:
    """The same census once more."""
    return lambda: check(census_here(tiny("llava"), str(whole / "data.parquet"), run, **SIZES))


def unmerge(run: Path) -> None:
    """Have the run's tables made again, as if its driver had died before they were visible."""
    for snapshot in (run / "snapshots/census").glob("*.json"):
        snapshot.unlink()


def check(outcome: CensusResult) -> None:
    assert outcome.complete
    assert outcome.samples == 6


def same_tables(run: Path, whole: Path) -> None:
    for name in TABLES:
        assert open_run(run).table(name).equals(open_run(whole / "run").table(name)), name


def part(run: Path, shard: int, name: str) -> Path:
    receipt = json.loads((run / f"receipts/{shard:06d}.json").read_text())
    return run / str(receipt["parts"][name])


def flip(file: Path) -> None:
    """Change one bit, far from both ends."""
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def exchange(run: Path, *names: str) -> None:
    for name in names:
        shutil.copy(part(run, 0, name), part(run, 1, name))


DAMAGES: list[Callable[[Path], object]] = [cut, empty, Path.unlink, flip]


def refused_once(again: Callable[[], None], *said: str) -> None:
    """Be refused in one line that names what is damaged and what to do; then do that."""
    with pytest.raises(InputError) as refusal:
        again()
    for words in said:
        assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    again()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if name != "decoded"])
def test_a_flipped_bit_in_a_part(run: Path, whole: Path, again: Callable[[], None], name: str) -> None:
    flip(part(run, 1, name))
    unmerge(run)
    refused_once(again, f"-{name}.parquet: changed since", "receipts/000001.json is removed: run the same command")
    same_tables(run, whole)


@pytest.mark.parametrize("names", [("concepts",), tuple(name for name in PARTS if name != "decoded")])
def test_parts_of_another_shard(run: Path, whole: Path, again: Callable[[], None], names: tuple[str, ...]) -> None:
    exchange(run, *names)
    unmerge(run)
    try:
        again()
    except InputError as refusal:  # of the same size: only reading them tells
        assert "receipts/000001.json is removed: run the same command again" in str(refusal)
        again()
    same_tables(run, whole)


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
def test_a_part_that_is_cut_or_gone_is_made_again_at_once(
    run: Path, whole: Path, again: Callable[[], None], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(part(run, 1, "concepts"))
    unmerge(run)
    again()
    assert "receipts/000001.json is removed; its unit will be done again" in caplog.text
    same_tables(run, whole)


def wrong_shard(run: Path) -> None:
    shutil.copy(run / "receipts/000001.json", run / "receipts/000002.json")


def wrong_run(run: Path) -> None:
    change(run / "receipts/000001.json", run="another")


def unknown_shard(run: Path) -> None:
    change(run / "receipts/000001.json", shard_id=99)
    shutil.copytree(run / "shards/000001", run / "shards/000099")
    text = (run / "receipts/000001.json").read_text().replace("shards/000001", "shards/000099")
    (run / "receipts/000099.json").write_text(text)
    (run / "receipts/000001.json").unlink()


def parts_of_another(run: Path) -> None:
    text = (run / "receipts/000000.json").read_text().replace('"shard_id": 0', '"shard_id": 1')
    (run / "receipts/000001.json").write_text(text)


def no_parts(run: Path) -> None:
    change(run / "receipts/000001.json", parts=None)


def cut_receipt(run: Path) -> None:
    cut(run / "receipts/000001.json")


def strange_receipt(run: Path) -> None:
    (run / "receipts/000001.json").write_text("[1, 2]")


def cut_reason(run: Path) -> None:
    (run / "aside").mkdir()
    (run / "aside/000001.json").write_text('{"shard_')
    (run / "receipts/000001.json").unlink()


RECEIPTS = [
    wrong_shard,
    wrong_run,
    unknown_shard,
    parts_of_another,
    no_parts,
    cut_receipt,
    strange_receipt,
    cut_reason,
]


@pytest.mark.slow
@pytest.mark.parametrize("damage", RECEIPTS)
@pytest.mark.parametrize("finished", [True, False])
def test_a_wrong_receipt_is_told_and_its_shard_done_again(
    run: Path, whole: Path, again: Callable[[], None], damage: Callable[[Path], None], finished: bool
) -> None:
    damage(run)
    if not finished:
        unmerge(run)
    with pytest.raises(InputError, match=r"(receipts|aside)/0000.*json: .*; remove .* and run the same command again$"):
        open_run(run).status()
    again()
    same_tables(run, whole)
    assert open_run(run).status().pending == 0


def test_a_receipt_that_vanishes_before_the_merge(
    run: Path, whole: Path, again: Callable[[], None], tiny: Callable[[str], Path]
) -> None:
    (run / "receipts/000002.json").unlink()

    def lose(progress: Progress) -> None:
        if progress.phase == "merging":
            (run / "receipts/000000.json").unlink()

    with pytest.raises(InputError, match=r"1 of 3 units are neither committed nor quarantined \(the first is unit 0\)"):
        census_here(tiny("llava"), str(whole / "data.parquet"), run, **SIZES, follow=lose)
    again()
    same_tables(run, whole)


def test_a_receipt_that_vanished_from_a_finished_run(run: Path, whole: Path, again: Callable[[], None]) -> None:
    (run / "receipts/000000.json").unlink()
    again()
    same_tables(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rankings", "captions"])
def test_a_damaged_table_is_noticed_and_made_again(
    run: Path, whole: Path, again: Callable[[], None], damage: Callable[[Path], None], name: str
) -> None:
    (file,) = (run / "snapshots/census").glob(f"*/{name}/00000.parquet")
    damage(file)
    with pytest.raises(InputError, match=rf"{name}.*; run mmray census again to rebuild the tables$"):
        open_run(run).table(name)
    again()
    same_tables(run, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_neurons_write_is_decoded_again(
    run: Path, whole: Path, again: Callable[[], None], damage: Callable[[Path], None]
) -> None:
    (file,) = (run / "decoding").glob("*/shards/000000/*-decoded.parquet")
    damage(file)
    unmerge(run)
    try:
        again()
    except InputError as refusal:
        assert "receipts/000000.json is removed: run the same command again" in str(refusal)
        again()
    same_tables(run, whole)


@pytest.mark.parametrize("damage", [cut, empty])
def test_a_cut_snapshot_locks_nothing(
    run: Path, whole: Path, again: Callable[[], None], damage: Callable[[Path], None]
) -> None:
    (snapshot,) = (run / "snapshots/census").glob("*.json")
    damage(snapshot)
    with pytest.raises(InputError, match=r"not a snapshot, or a truncated one; run mmray census again$"):
        open_run(run).status()
    again()
    same_tables(run, whole)
    assert open_run(run).status().finished


@pytest.mark.parametrize("name", ["run.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, empty])
def test_what_a_run_is_can_not_be_made_up(
    run: Path, again: Callable[[], None], damage: Callable[[Path], None], name: str
) -> None:
    damage(run / name)
    with pytest.raises(InputError, match=f"{name.removesuffix('.json')}.*(give another folder|start a new run)$"):
        again()


def test_a_driver_that_lost_its_lease_writes_no_table(run: Path, whole: Path, tiny: Callable[[str], Path]) -> None:
    unmerge(run)
    (run / "receipts/000002.json").unlink()

    def lose(_: Progress) -> None:
        # As after a pause of the machine: nobody has told the driver yet.
        later = replace(this_process(), machine="another", token="theirs")
        open_store(run).put("lease/000099.json", json.dumps(asdict(later)).encode())

    before = {file: file.stat().st_mtime_ns for file in (run / "tables").iterdir()}
    with pytest.raises(InputError, match="another driver has taken the run over; leave it to that one"):
        census_here(tiny("llava"), str(whole / "data.parquet"), run, **SIZES, follow=lose)
    assert {file: file.stat().st_mtime_ns for file in (run / "tables").iterdir()} == before
    assert not list((run / "snapshots/census").glob("*.json"))


def test_files_of_others_are_left_alone(run: Path, whole: Path, again: Callable[[], None]) -> None:
    folders = ("", "receipts", "lease", "attempts", "attempts/000001", "aside", "shards", "shards/000001", "tables")
    strangers = [run / folder / name for folder in folders for name in (".DS_Store", "notes.txt")]
    for file in strangers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\x00\x01")
    (run / "receipts/000001.json").unlink()
    again()
    same_tables(run, whole)
    assert open_run(run).status().finished
    assert all(file.exists() for file in strangers)


def test_a_receipt_of_a_later_version_is_read(run: Path, again: Callable[[], None]) -> None:
    for file in (run / "receipts").iterdir():
        change(file, invented_later={"x": 1})
    before = RunFolder(open_store(run)).receipts()
    again()
    assert RunFolder(open_store(run)).receipts() == before


def test_a_run_of_an_earlier_version_is_read_without_checks(run: Path, whole: Path, again: Callable[[], None]) -> None:
    for file in [*run.glob("receipts/*"), *run.glob("decoding/*/receipts/*")]:
        content = json.loads(file.read_text())
        file.write_text(json.dumps({key: content[key] for key in content if key not in ("run", "checksums")}))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.parent.name != "lease"}
    same_tables(run, whole)
    again()
    assert {file: file.read_bytes() for file in before} == before
    unmerge(run)
    again()
    same_tables(run, whole)


def test_a_copy_of_a_table_that_somebody_removed(run: Path, whole: Path, again: Callable[[], None]) -> None:
    (run / "tables/rankings.parquet").unlink()
    same_tables(run, whole)
    again()
    assert read_table(open_store(run), "rankings").equals(open_run(whole / "run").table("rankings"))
