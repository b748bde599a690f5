"""An OUT that takes no more, or nothing at all: one line, and the run goes on once there is room."""

import re
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmray.storage import retries
from tests.support.command import Answer
from tests.support.scenes import scenes, write

Mmray = Callable[..., Answer]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Have an empty file system there; skip where that is not allowed."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no right to mount a file system ({made.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def arguments(tiny: Callable[[str], Path], tmp_path: Path) -> list[object]:
    data = write(tmp_path / "data.parquet", scenes(4))
    return ["census", "--local", "--model", tiny("llava"), "--data", data, "--out", tmp_path / "disk" / "run"]


def test_a_disk_that_may_not_be_written(mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro"):
        refusal = mmray(*arguments(tiny, tmp_path)).refusal
    assert refusal.endswith("disk/run: can't write here (Read-only file system); choose another OUT or fix it")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that waiting moves at once; `then` is what happens at 300 seconds, `waited` is by thread."""
    found = SimpleNamespace(now=0.0, then=None, waited=Counter())
    lock = threading.Lock()

    def sleep(seconds: float) -> None:
        with lock:  # two threads that add at once would lose a wait
            found.now += seconds
        # Not by its number, which a later thread may have again.
        found.waited[threading.current_thread()] += seconds
        if found.then is not None and found.now >= 300:
            found.then()
            found.then = None

    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: found.now, sleep=sleep))
    return found


@pytest.mark.parametrize(
    ("size", "where"),
    [
        ("64k", r"disk/run: No space left on device, where [0-9.]+ MB are needed"),
        ("128k", r"disk/run/snapshots/.*: No space left on device"),
    ],
)
def test_a_full_disk_and_more_room(
    mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path, clock: SimpleNamespace, size: str, where: str
) -> None:
    command = arguments(tiny, tmp_path)
    with mounted(tmp_path / "disk", f"size={size}"):
        answer = mmray(*command)
        assert answer.status == 2
        assert re.match(
            rf"mmray: .*{where}; make room and run the same command again to resume$", answer.err.splitlines()[-1]
        )
        # The ten minutes that are promised.
        assert clock.now >= 600
        # Parts are written by several threads: by this clock their waiting adds up, and each waits no longer itself.
        assert max(clock.waited.values()) <= 600
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True)
        assert mmray(*command).status == 0


def test_room_that_is_made_in_time_is_all_that_it_takes(
    mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path, clock: SimpleNamespace
) -> None:
    with mounted(tmp_path / "disk", "size=128k"):
        clock.then = lambda: subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True)
        answer = mmray(*arguments(tiny, tmp_path))
    assert answer.status == 0, answer.err
    assert 300 <= clock.now < 400
