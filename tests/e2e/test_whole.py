"""The console script in processes of its own, with a Ray of its own: what a user sees from start to end."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmray.features.census.tables import TABLES
from tests.support.scenes import bad_samples, write

pytestmark = pytest.mark.slow


def test_a_census_on_its_own_ray_keeps_the_terminal_clean(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.parquet", bad_samples()), tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "mmray",
        "census",
        "--model",
        str(tiny("llava")),
        "--data",
        data,
        "--out",
        str(out),
    ]
    answer = subprocess.run([*command, "--workers", "1", "--json"], capture_output=True, text=True, check=False)
    assert answer.returncode == 4, answer.stderr
    told = json.loads(answer.stdout)
    assert (told["failures"], told["skipped"]) == (2, {"no noun": 1})
    # Nothing of Ray's: where there is no terminal, progress is a line a minute and one at the end.
    assert re.fullmatch(r"12 of 12 samples, .* 2 failed.*\n", answer.stderr)
    for name, schema in TABLES.items():
        assert pq.read_table(out / "tables" / f"{name}.parquet").schema.names == schema.names, name


MMRAY = "from tests.support.forked_workers import use; use(); from mmray.cli import main; main()"
"""The command line, whose Ray has forks for workers: the census above has those that Ray itself starts."""


@pytest.mark.timeout(1500)  # a minute by itself; on a busy machine, next to other tests, four times that
def test_the_demo_and_the_command_it_names_next(tmp_path: Path, forks: None) -> None:
    script = str(Path(sys.executable).with_name("mmray"))
    command = [sys.executable, "-c", MMRAY, "demo", "--quick", "--out", str(tmp_path / "demo")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    paths = re.findall(rf"{re.escape(str(tmp_path))}[^\s]*", answer.stdout)
    assert paths
    assert all(Path(path).exists() for path in paths)
    nexts = re.search(r"next: (.*)", answer.stdout)
    assert nexts is not None
    for line in nexts[1].split(" · "):
        name, *arguments = shlex.split(line)
        assert name == "mmray"
        done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.search(r"L\d+\.u\d+", done.stdout)
