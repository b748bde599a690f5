"""What passes by itself is waited for, as long as is promised, by the clock; nothing else is."""

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmray.errors import OutageError
from mmray.runs import RunFolder, folder
from mmray.runs.lease import hold_lease
from mmray.storage import LocalStore, NamedCommits, RetryingStore, retries, with_retries, without_retries
from tests.support.commits import tables


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that only sleeping moves; `at` is what happens at a time."""
    found = SimpleNamespace(now=0.0, at={})

    def sleep(seconds: float) -> None:
        found.now += seconds
        for due in [due for due in found.at if due <= found.now]:
            found.at.pop(due)()

    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: found.now, sleep=sleep))
    return found


class Disk(LocalStore):
    """A disk that takes no more while it is full."""

    full = errno.ENOSPC

    def commit(self, key: str, data: bytes) -> bool:
        """Refuse, or do as the real one."""
        if self.full:
            raise OSError(self.full, os.strerror(self.full), key)
        return super().commit(key, data)

    put = commit  # type: ignore[assignment]


class Network(LocalStore):
    """A store that can't be reached while it is down."""

    down = True

    def exists(self, key: str) -> bool:
        """Fail, or do as the real one."""
        if self.down:
            raise OutageError("down")
        return super().exists(key)


def answered(store: RetryingStore) -> RetryingStore:
    """Return the store after its first answer."""
    store.list()
    return store


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EDQUOT, "outage"])
def test_ten_minutes_are_waited_for_room(clock: SimpleNamespace, problem: int | str) -> None:
    error = OutageError("down") if isinstance(problem, str) else OSError(problem, os.strerror(problem))
    calls: list[float] = []

    def action() -> None:
        calls.append(clock.now)
        raise error

    with pytest.raises(type(error)) as raised:
        with_retries(action)
    assert raised.value is error
    assert clock.now == 600
    assert max(later - earlier for earlier, later in pairwise(calls)) <= retries.LONGEST_PAUSE


def test_an_action_within_another_is_waited_for_once(clock: SimpleNamespace) -> None:
    begun: list[float] = []

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work() -> None:
        begun.append(clock.now)
        clock.now += 30
        with_retries(full)

    with pytest.raises(OSError, match="No space left"):
        with_retries(work)
    assert (begun, clock.now) == ([0], 630)


def test_an_outage_before_the_first_answer_is_raised_at_once(clock: SimpleNamespace, tmp_path: Path) -> None:
    network = Network(tmp_path)
    store = RetryingStore(network)
    for _ in range(2):
        with pytest.raises(OutageError):
            store.exists("a")
    assert clock.now == 0
    network.down = False
    assert not store.exists("a")
    network.down = True
    clock.at[60.0] = lambda: setattr(network, "down", False)
    assert not store.exists("a")
    assert clock.now >= 60


def test_a_folder_has_answered_once_it_is_open(
    clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(tmp_path)
    monkeypatch.setattr(folder, "open_store", lambda _: network)
    with pytest.raises(OutageError):
        RunFolder.at(tmp_path)
    assert clock.now == 0
    network.down = False
    opened = RunFolder.at(tmp_path)
    network.down = True
    clock.at[60.0] = lambda: setattr(network, "down", False)
    assert not opened.store.exists("run.json")
    assert clock.now >= 60


@pytest.mark.parametrize("problem", [errno.EROFS, errno.EACCES, errno.EIO])
def test_what_no_waiting_helps_is_raised_at_once(clock: SimpleNamespace, problem: int) -> None:
    def action() -> None:
        raise OSError(problem, os.strerror(problem))

    with pytest.raises(OSError, match=os.strerror(problem)):
        with_retries(action)
    assert clock.now == 0


def test_a_shard_is_committed_once_there_is_room(clock: SimpleNamespace, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    clock.at[300.0] = lambda: setattr(disk, "full", 0)
    receipt = RunFolder(answered(RetryingStore(disk))).commit_shard(0, tables(), 1, 1.0)
    assert RunFolder(disk).receipts() == {0: receipt}
    assert 300 <= clock.now < 600


def test_a_disk_that_stays_full_says_what_the_shard_needs(clock: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device, where [0-9.]+ MB are needed") as raised:
        RunFolder(answered(RetryingStore(Disk(tmp_path)))).commit_shard(0, tables(), 1, 1.0)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(tmp_path)
    # What a disk is full of is not a shard's that could not be committed.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_end_of_a_lease_waits_for_nothing(clock: SimpleNamespace, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.full = 0
    with hold_lease(RetryingStore(disk)):
        disk.full = errno.ENOSPC
    assert clock.now == 0


@pytest.mark.parametrize("wrap", [lambda store: store, RetryingStore, lambda store: NamedCommits(RetryingStore(store))])
def test_a_store_without_retries_is_the_same_store(
    clock: SimpleNamespace, tmp_path: Path, wrap: Callable[..., object]
) -> None:
    disk = Disk(tmp_path)
    store = without_retries(wrap(disk))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        store.put("a", b"b")
    assert clock.now == 0
    disk.full = 0
    assert store.commit("a", b"b")
    assert without_retries(wrap(disk)).read("a") == b"b"  # type: ignore[arg-type]
