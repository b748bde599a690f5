"""A store that can't create if absent: commits by name keep what a run relies on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmray.runs import RunFolder
from mmray.storage import LocalStore, NamedCommits, Store, commits_once, s3_client
from tests.support.commits import check_any_death, check_late_worker, info, tables
from tests.support.stores import Meanwhile, Unconditional, Unwilling


@pytest.fixture
def named(store: Store) -> NamedCommits:
    return NamedCommits(Unconditional(store))


@pytest.fixture
def no_conditions(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A real store that disregards conditions (S3) or has no hard links (local), as `open_store` gives it."""

    def strip(request: Any, **_: object) -> None:
        del request.headers["If-None-Match"]

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if isinstance(store, LocalStore):
        monkeypatch.setattr("os.link", refuse)
        yield store
        return
    events = s3_client().meta.events
    events.register("before-sign.s3.PutObject", strip)
    yield store
    events.unregister("before-sign.s3.PutObject", strip)


def test_the_first_commit_counts(named: NamedCommits) -> None:
    assert named.commit("a/b.json", b"first")
    assert not named.commit("a/b.json", b"second, and longer")
    assert named.read("a/b.json") == b"first"
    assert named.exists("a/b.json")
    assert not named.exists("a/b")
    entry = named.entry("a/b.json")
    assert entry is not None
    assert (entry.key, entry.size) == ("a/b.json", 5)
    assert [found.key for found in named.list("a/")] == ["a/b.json"]
    with pytest.raises(FileNotFoundError):
        named.read("a/b")


def test_a_put_replaces_what_was_committed(named: NamedCommits) -> None:
    named.commit("attempts/1", b"{}")
    named.put("attempts/1", b"it died")
    assert named.read("attempts/1") == b"it died"
    assert [(found.key, found.size) for found in named.list()] == [("attempts/1", 7)]
    named.delete("attempts/1")
    assert named.list() == []
    assert not named.exists("attempts/1")


def test_of_two_that_commit_within_one_moment_readers_see_one(store: Store) -> None:
    # The second is told that it has committed, and then an earlier one appears that was long under way.
    named = NamedCommits(store)
    assert named.commit("key", b"second")
    store.put("key~00000000000000000001-aaaa", b"first")
    if isinstance(store, LocalStore):
        os.utime(store.root / "key~00000000000000000001-aaaa", (1, 1))
        assert named.read("key") == b"first"
    assert {named.read("key") for _ in range(3)} <= {b"first", b"second"}
    assert [entry.key for entry in named.list()] == ["key"]
    assert len(named.incomplete_writes()) == 1
    kept = named.read("key")
    named.delete(named.incomplete_writes()[0].key)
    assert named.read("key") == kept


def test_a_run_on_such_a_store_says_so_and_is_read_alike(no_conditions: Store) -> None:
    folder = RunFolder.at(no_conditions.uri)
    folder.begin(info(limit=1), b"manifest")
    assert isinstance(folder.store, NamedCommits)
    again = RunFolder.at(no_conditions.uri)
    assert isinstance(again.store, NamedCommits)
    assert again.info() == info(limit=1)
    assert again.manifest() == b"manifest"
    assert again.attempt(0) == 1
    assert again.attempt(0) == 2
    receipt = again.commit_shard(0, tables(), 1, 1.0)
    assert RunFolder.at(no_conditions.uri).receipts() == {0: receipt}


def test_a_store_that_keeps_conditions_is_used_as_it_is(store: Store) -> None:
    folder = RunFolder.at(store.uri)
    folder.begin(info(), b"manifest")
    assert not isinstance(folder.store, NamedCommits)
    assert [entry.key for entry in store.list()] == ["manifest.json", "run.json"]


def test_a_late_worker_changes_nothing(store: Store) -> None:
    class Named(RunFolder):
        def __init__(self, inner: Store) -> None:
            super().__init__(NamedCommits(Unconditional(inner)))

    folder = Named(store)
    first = folder.commit_shard(0, tables("first"), 1, 1.0)
    assert folder.commit_shard(0, tables("late"), 1, 2.0) == first
    assert folder.read_part(folder.receipts()[0], "captions")["sample_id"].to_pylist() == ["first"]


def test_without_names_a_late_worker_would_be_noticed(store: Store) -> None:
    with pytest.raises(AssertionError):
        check_late_worker(RunFolder, Unconditional(store))


def test_a_worker_may_die_at_any_moment(tmp_path: Path) -> None:
    class Named(RunFolder):
        def __init__(self, inner: Store) -> None:
            super().__init__(NamedCommits(inner))

    check_any_death(Named, tmp_path)


def test_two_workers_at_once_leave_one_whole_shard(store: Store) -> None:
    def other() -> None:
        RunFolder(named).commit_shard(0, tables("other"), 1, 1.0)

    named = NamedCommits(Unwilling(store))
    mine = RunFolder(Meanwhile(named, len(tables()), other)).commit_shard(0, tables("mine"), 1, 2.0)
    receipt = RunFolder(named).receipts()[0]
    assert mine == receipt
    assert RunFolder(named).read_part(receipt, "captions")["sample_id"].to_pylist() == ["other"]


def test_it_is_told_apart(no_conditions: Store) -> None:
    assert not commits_once(no_conditions)
    assert no_conditions.list() == []
