"""A run's folder: shards are committed once and whole whatever dies, attempts are counted, settings are kept."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pytest

from mmray.errors import InputError
from mmray.features.census.tables import PARTS
from mmray.runs import ATTEMPTS, Receipt, RunFolder
from mmray.storage import Store
from tests.support.broken_stores import ReceiptFirst, ReceiptReplaced
from tests.support.commits import check_any_death, check_late_worker, info, tables
from tests.support.stores import Forgetful, Killed, Meanwhile, Mortal


def test_a_worker_may_die_at_any_moment(tmp_path: Path) -> None:
    check_any_death(RunFolder, tmp_path)


def test_a_receipt_before_the_parts_would_be_noticed(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_any_death(ReceiptFirst, tmp_path)


def test_a_late_worker_changes_nothing(store: Store) -> None:
    check_late_worker(RunFolder, store)


def test_a_receipt_that_is_replaced_would_be_noticed(store: Store) -> None:
    with pytest.raises(AssertionError):
        check_late_worker(ReceiptReplaced, store)


def test_workers_on_one_shard_at_once_commit_it_once(store: Store) -> None:
    together = Barrier(4)

    def work(name: str) -> Receipt:
        together.wait()
        return RunFolder(store).commit_shard(0, tables(name), 1, 1.0)

    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(work, "abcd"))
    assert all(receipt == receipts[0] for receipt in receipts)
    kept = RunFolder(store).read_part(receipts[0], "captions")["sample_id"].to_pylist()
    assert len(kept) == 1
    assert len(store.list("shards/000000/")) == len(tables())


def test_a_lost_answer_loses_no_parts(store: Store) -> None:
    receipt = RunFolder(Forgetful(store)).commit_shard(0, tables(), 1, 1.0)
    folder = RunFolder(store)
    assert folder.receipts() == {0: receipt}
    for name, table in tables().items():
        assert folder.read_part(receipt, name).equals(table)


def test_receipts_say_what_a_shard_amounts_to_and_come_in_order(store: Store) -> None:
    folder = RunFolder(store)
    parts = tables()
    parts["errors"] = pa.Table.from_pylist([{"source": source} for source in "abb"], schema=PARTS["errors"])
    parts["occurrences"] = pa.Table.from_pylist([{"concept": "dog"}] * 3, schema=PARTS["occurrences"])
    for shard_id in (11, 2, 1_000_000):
        folder.commit_shard(shard_id, parts, 5, 1.23456)
    receipts = folder.receipts()
    assert list(receipts) == [2, 11, 1_000_000]
    receipt = receipts[11]
    assert (receipt.samples, receipt.failures, receipt.occurrences, receipt.seconds) == (5, 2, 3, 1.235)
    assert folder.receipt(11) == receipt
    assert folder.receipt(12) is None


def test_attempts_are_counted_by_shard(store: Store) -> None:
    folder = RunFolder(store)
    assert [folder.attempt(7) for _ in range(3)] == [1, 2, 3]
    assert folder.attempt(8) == 1
    # Another worker, perhaps after the first one's death, goes on counting.
    assert RunFolder(store).attempt(7) == 4


def test_an_attempt_whose_answer_was_lost_is_counted_once(store: Store) -> None:
    assert [RunFolder(Forgetful(store)).attempt(0) for _ in range(3)] == [1, 2, 3]


def test_attempts_at_once_get_numbers_of_their_own(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(lambda _: RunFolder(store).attempt(0), range(6)))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def die(folder: RunFolder, shard_id: int, *reasons: str | None) -> None:
    for reason in reasons:
        number = folder.attempt(shard_id)
        if reason is not None:
            folder.record_death(shard_id, number, reason)


def test_a_shard_is_quarantined_with_what_its_last_attempt_died_of(store: Store) -> None:
    folder = RunFolder(store)
    die(folder, 3, "ValueError: first", None, "OSError: disk full")
    assert folder.attempt(3) > ATTEMPTS
    receipt = folder.quarantine(3, samples=10)
    assert receipt.reason == f"given up after {ATTEMPTS} attempts: OSError: disk full"
    assert folder.quarantined() == {3: receipt}
    assert receipt.samples == 10


def test_a_worker_that_dies_without_a_word(store: Store) -> None:
    folder = RunFolder(store)
    die(folder, 0, "ValueError: x", None, None)
    assert "the worker died without a word" in str(folder.quarantine(0, samples=1).reason)


def test_a_shard_that_a_late_worker_commits_after_all_is_not_quarantined(store: Store) -> None:
    folder = RunFolder(store)
    die(folder, 0, None, None, None)
    die(folder, 1, None, None, None)
    folder.quarantine(0, samples=1)
    folder.quarantine(1, samples=1)
    folder.commit_shard(0, tables(), 1, 1.0)
    assert list(folder.quarantined(folder.receipts())) == [1]


def test_going_on_forgets_the_attempts_that_ended_with_the_driver(store: Store) -> None:
    folder = RunFolder(store)
    for shard_id in range(4):
        die(folder, shard_id, None, None, None)
    folder.quarantine(2, samples=1)
    folder.quarantine(3, samples=1)
    folder.reopen([0, 2])
    assert list(folder.quarantined()) == [3]
    assert [folder.attempt(shard_id) for shard_id in range(4)] == [1, 4, 1, 4]


def test_a_run_begins_once_and_is_joined_by_its_like(store: Store) -> None:
    folder = RunFolder(store)
    assert folder.info() is None
    folder.begin(info(limit=1) | {"settings": {"workers": 1}}, b"manifest")
    folder.begin(info(limit=1) | {"settings": {"workers": 2}}, b"manifest")
    assert folder.info() == info(limit=1) | {"settings": {"workers": 1}}
    assert folder.manifest() == b"manifest"


def test_a_driver_that_died_between_the_two_objects_is_made_good(store: Store) -> None:
    with pytest.raises(Killed):
        RunFolder(Mortal(store, 1)).begin(info(), b"manifest")
    RunFolder(store).begin(info(), b"manifest")
    assert RunFolder(store).manifest() == b"manifest"


@pytest.mark.parametrize("commits", [0, 1])
def test_two_drivers_that_begin_at_once(store: Store, commits: int) -> None:
    def other() -> None:
        try:
            RunFolder(store).begin(info("b", shard_size=2), b"manifest of b")
        except InputError:
            won.append("a")
        else:
            won.append("b")

    won: list[str] = []
    try:
        RunFolder(Meanwhile(store, commits, other)).begin(info("a", shard_size=1), b"manifest of a")
    except InputError:
        assert won == ["b"]
    else:
        assert won == ["a"]
    begun = RunFolder(store).info()
    assert begun is not None
    assert RunFolder(store).manifest().decode() == f"manifest of {begun['fingerprint']}"
    assert begun["fingerprint"] == won[0]


def test_many_drivers_of_two_kinds_leave_one_run(store: Store) -> None:
    together = Barrier(8)

    def begin(number: int) -> str | None:
        kind = "ab"[number % 2]
        together.wait()
        try:
            RunFolder(store).begin(info(kind, shard_size=number % 2), f"manifest of {kind}".encode())
        except InputError:
            return None
        return kind

    with ThreadPoolExecutor(8) as pool:
        began = [kind for kind in pool.map(begin, range(8)) if kind is not None]
    assert began in (["a"] * 4, ["b"] * 4)
    assert RunFolder(store).manifest().decode() == f"manifest of {began[0]}"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (info("g", top_k=5, limit=8), r"\(limit was None, now 8; top_k was 20, now 5\)"),
        (info("g", top_k=20, limit=None, later="x"), r"\(later was None, now 'x'\)"),
        (info("g", top_k=20), r"settings \(.*other model\)"),
    ],
)
def test_what_differs_is_named(store: Store, other: dict[str, object], said: str) -> None:
    RunFolder(store).begin(info("f", top_k=20, limit=None), b"")
    if "model" in said:
        other = other | {"digests": {"data": "d", "model": "another"}}
    with pytest.raises(InputError, match=said) as failure:
        RunFolder(store).begin(other, b"")
    assert str(failure.value).startswith(f"{store.uri}: ")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("content", [b"not JSON", b"{}", b"[]", b'{"fingerprint": "x"}', b"null"])
def test_a_run_json_of_others(store: Store, content: bytes) -> None:
    store.put("run.json", content)
    actions: list[Callable[[], object]] = [RunFolder(store).info, lambda: RunFolder(store).begin(info(), b"")]
    for action in actions:
        with pytest.raises(InputError, match=r"run\.json: not written by mmray"):
            action()
