"""What both stores promise: objects are created once, whole or not at all, and listed in order."""

import errno
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest

from mmray.errors import InputError, StorageError
from mmray.storage import LocalStore, Store, commits_once, open_store
from tests.support.stores import Forgetful, Unconditional, Unwilling, Wrapped

BIG = 1 << 20


def keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix)]


def test_a_commit_creates_once(store: Store) -> None:
    assert store.commit("a/b.json", b"first")
    assert not store.commit("a/b.json", b"second, and longer")
    assert store.read("a/b.json") == b"first"
    assert store.commit("a/c.json", b"")
    assert store.read("a/c.json") == b""


def test_put_replaces_and_delete_makes_room(store: Store) -> None:
    store.put("a", b"first")
    before = store.entry("a")
    store.put("a", b"other")
    assert store.read("a") == b"other"
    assert store.entry("a") != before
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")
    assert store.entry("a") is None
    assert store.commit("a", b"third")


def test_what_is_not_there(store: Store) -> None:
    store.put("folder/file", b"x")
    for key in ("none", "folder", "folder/file/below", "folder/none"):
        assert not store.exists(key), key
        assert store.entry(key) is None, key
        with pytest.raises(FileNotFoundError):
            store.read(key)
    assert store.list("none/") == []
    assert store.list("folder/file/below") == []


def test_listing_is_by_prefix_and_in_order_of_key(store: Store) -> None:
    written = ["b/10", "b/9", "b.json", "a", "b/c/d", "ä", "bb", "b-"]
    for key in written:
        store.put(key, key.encode())
    for prefix in ("", "b", "b/", "b/1", "b/c", "b/c/", "c", "ä"):
        assert keys(store, prefix) == sorted(key for key in written if key.startswith(prefix)), prefix
    assert {entry.key: entry.size for entry in store.list()} == {key: len(key.encode()) for key in written}


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a/..", "/etc/x", ".."])
def test_keys_that_escape_are_refused(store: Store, key: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: store.read(key),
        lambda: store.exists(key),
        lambda: store.entry(key),
        lambda: store.commit(key, b"x"),
        lambda: store.put(key, b"x"),
        lambda: store.delete(key),
        lambda: store.list(f"{key}/"),
    ]
    for action in actions:
        with pytest.raises(InputError, match="leaves"):
            action()
    assert store.list() == []


def test_of_many_committers_exactly_one_wins(store: Store) -> None:
    together = Barrier(8)

    def commit(number: int) -> list[bool]:
        results = []
        for key in range(10):
            together.wait()
            results.append(store.commit(f"key-{key}", str(number).encode() * 1000))
        return results

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(commit, range(8)))
    for key in range(10):
        winners = [number for number in range(8) if won[number][key]]
        assert len(winners) == 1
        assert store.read(f"key-{key}") == str(winners[0]).encode() * 1000


def test_of_many_processes_exactly_one_wins(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        from mmray.storage import open_store
        store, me = open_store(sys.argv[1]), sys.argv[2]
        store.put(f"ready/{me}", b"")
        while len(store.list("ready/")) < 3:
            time.sleep(0.001)
        print([store.commit(f"key-{key}", me.encode() * 100_000) for key in range(40)])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    processes = [subprocess.Popen([*command, me], stdout=subprocess.PIPE, text=True) for me in "abc"]
    won = [eval(process.communicate()[0]) for process in processes]
    for key in range(40):
        winners = [me for me, mine in zip("abc", won, strict=True) if mine[key]]
        assert len(winners) == 1
        assert (tmp_path / f"key-{key}").read_bytes() == winners[0].encode() * 100_000


def test_a_reader_sees_one_content_or_the_other(store: Store) -> None:
    contents = [letter * BIG for letter in (b"a", b"b")]
    store.put("x", contents[0])
    stop = Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                store.put("x", content)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write)
        try:
            seen = [store.read("x") for _ in range(30)]
        finally:
            stop.set()
    assert set(seen) <= set(contents)


@pytest.mark.parametrize("write", ["commit", "put"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, write: str) -> None:
    store = LocalStore(tmp_path)
    store.put("there", b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system itself stops the write half way, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (BIG // 2, limits[1]))
    try:
        for key in ("new", "there"):
            with pytest.raises(OSError) as failure:
                getattr(store, write)(key, b"x" * BIG)
            assert failure.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert store.read("there") == b"before"
    assert store.commit("new", b"x" * BIG)


@pytest.mark.parametrize(("write", "step"), [("commit", "link"), ("commit", "fsync"), ("put", "replace")])
def test_a_kill_before_the_name_is_given_leaves_no_object(tmp_path: Path, write: str, step: str) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from mmray.storage import LocalStore
        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        setattr({"Path" if step == "replace" else "os"}, "{step}", kill)
        LocalStore(Path({str(tmp_path)!r})).{write}("folder/key", b"x" * {BIG})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == -9
    store = LocalStore(tmp_path)
    assert list((tmp_path / "folder").iterdir())  # the temporary file, which nothing shows
    assert store.list() == []
    assert store.list("folder/") == []
    assert not store.exists("folder/key")
    assert store.commit("folder/key", b"whole")


def test_a_replacement_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("folder/file", b"x")
    with pytest.raises(OSError):
        store.put("folder", b"a folder can't be replaced")
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file"}


def test_objects_that_go_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    for key in "abc":
        store.put(key, b"x")
    walk = os.walk

    def walk_and_lose(folder: Path, onerror: Callable[[OSError], None] | None = None) -> object:
        found = list(walk(folder, onerror=onerror))
        store.delete("b")
        return found

    monkeypatch.setattr(os, "walk", walk_and_lose)
    assert keys(store) == ["a", "c"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put("closed/a", b"x")
    scan = os.scandir

    def refuse(path: Path | str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        store.list()


def test_a_lost_answer_is_no_store_without_conditions(store: Store) -> None:
    assert commits_once(Forgetful(store))
    assert store.list() == []


def test_a_check_leaves_nothing(store: Store) -> None:
    assert commits_once(store)
    assert store.list() == []


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file/run: can't write here \(Not a directory\); choose another OUT"):
        commits_once(open_store(tmp_path / "file" / "run"))


@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_without_permission_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        commits_once(open_store(tmp_path / "run"))


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_a_file_system_without_hard_links_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    assert not commits_once(open_store(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [Unconditional, Unwilling])
def test_a_store_without_conditions_is_noticed(store: Store, kind: type[Wrapped]) -> None:
    assert not commits_once(kind(store))
    assert store.list() == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/run", "scheme 'gs' is not supported; use a local path or s3://"),
        ("file:///tmp/run", "scheme 'file' is not supported"),
        ("s3://", "no bucket; write s3://BUCKET/PREFIX"),
        ("s3:///run", "no bucket"),
        ("s3:/bucket/run", "no bucket"),
        (Path("s3://bucket/run"), "no bucket"),
    ],
)
def test_addresses_that_name_no_store(uri: str | Path, said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_store(uri)


def test_every_letter_of_an_s3_address_counts(bucket: str) -> None:
    for name in ("run", "run?1", "run#1", "run 1"):
        open_store(f"s3://{bucket}/letters/{name}/").put("name", name.encode())
    for name in ("run", "run?1", "run#1", "run 1"):
        assert open_store(f"S3://{bucket}/letters/{name}").read("name") == name.encode()


def test_a_store_in_the_root_of_a_bucket(bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    assert store.commit("at-the-root", b"x")
    assert "at-the-root" in keys(store)


def test_no_bucket_of_that_name(bucket: str) -> None:
    store = open_store("s3://no-such-bucket/run")
    actions: list[Callable[[], object]] = [
        lambda: store.read("run.json"),
        lambda: store.list(),
        lambda: store.commit("x", b""),
        lambda: store.put("x", b""),
        lambda: store.delete("x"),
        lambda: commits_once(store),
    ]
    for action in actions:
        with pytest.raises(StorageError, match=r"^s3://no-such-bucket/run: .*; create the bucket or check its name$"):
            action()
