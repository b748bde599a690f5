"""An OUT that takes no more, or nothing at all: one line, and the run goes on once there is room."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Answer
from tests.e2e.scenes import scenes, write
from tests.running import without_ray

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
    return ["census", "--model", tiny("llava"), "--data", data, "--out", tmp_path / "disk" / "run"]


def test_a_disk_that_may_not_be_written(mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro"), without_ray():
        refusal = mmray(*arguments(tiny, tmp_path)).refusal
    assert refusal.endswith("disk/run: can't write here (Read-only file system); choose another OUT or mend it")


def test_a_full_disk_and_more_room(mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    command = arguments(tiny, tmp_path)
    with mounted(tmp_path / "disk", "size=32k"), without_ray():
        assert "disk/run: No space left on device; make room and run again" in mmray(*command).refusal
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True)
        assert mmray(*command).status == 0
