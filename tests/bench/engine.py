"""What the engine itself costs per unit, and whether anything got slower: `python -m tests.bench.engine`.

Without options, many units of no work go through the engine: seconds and memory of the driver, with the workers in
this process and, with `--ray`, on actors. `--against PATH` times whole commands next to those of another checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import ClassVar

import pyarrow as pa

from mmray.engine import (
    Executor,
    Job,
    JobSettings,
    LocalExecutor,
    Output,
    Parts,
    Plan,
    Progress,
    Unit,
    UnitResult,
    Worker,
    checked,
    known_by_digest,
    run,
)
from mmray.engine.units import UnitOutcome, WorkOrder

COUNTED = pa.schema([("n", pa.int64())])
MEBI = 1 << 20


class EmptySettings(JobSettings):
    out: str = known_by_digest()
    units: int = 10_000
    payload: int = 0
    """Bytes of a unit's payload."""


class EmptyJob(Job[EmptySettings, None]):
    """Commits a row per unit and does nothing else."""

    name = "empty"
    parts: ClassVar = {"counts": COUNTED}

    @property
    def target(self) -> str:
        return self.settings.out

    def plan(self) -> Plan[None]:
        return Plan([Unit(1, bytes(self.settings.payload)) for _ in range(self.settings.units)], {}, None)

    def worker(self, context: None) -> Worker:
        row = pa.table({"n": [1]}, COUNTED)
        return lambda unit: UnitResult({"counts": row})

    def merge(self, plan: Plan[None], parts: Parts, output: Output) -> dict[str, int]:
        counts = parts.table("counts")
        output.table("counts", counts.slice(0, 1))
        return {"rows": len(counts)}


@dataclass
class Watched:
    """An executor whose own seconds are set apart from the driver's, and those in which it starts."""

    inner: Executor
    apart: float = 0.0
    processor: float = 0.0
    """Seconds of this process's cores while it waited for answers."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.inner.session():
            self.apart += time.perf_counter() - began
            yield
            began = time.perf_counter()
        self.apart += time.perf_counter() - began

    def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
        answers = iter(self.inner.run(order, groups))
        while True:
            began, processor = time.perf_counter(), time.process_time()
            batch = next(answers, None)
            self.apart += time.perf_counter() - began
            self.processor += time.process_time() - processor
            if batch is None:
                return
            yield batch


@dataclass
class Memory:
    """Bytes of this process at some numbers of units."""

    at: Sequence[int]
    resident: dict[int, int] = field(default_factory=dict)
    python: dict[int, int] = field(default_factory=dict)

    def __call__(self, progress: Progress) -> None:
        for number in self.at:
            if progress.done >= number and number not in self.resident:
                self.resident[number] = resident()
                self.python[number] = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0

    def growth(self, of: str) -> float:
        """Return MiB between the first and the last of the numbers."""
        sizes: dict[int, int] = getattr(self, of)
        return (sizes[self.at[-1]] - sizes[self.at[0]]) / MEBI


@dataclass(frozen=True)
class Cost:
    """What many units of no work cost."""

    units: int
    work: float
    """Seconds until all units were answered for, the executor's included."""
    driver: float
    """Seconds of the driver: all but those in which it waited for answers; of these its processor's, on Ray."""
    again: float
    """Seconds of a second call, which finds everything done."""
    resident: float
    """MiB that the process grew by between a tenth of the units and all of them."""
    python: float
    """The same of Python's own objects; 0 where they were not traced."""

    def lines(self) -> Iterator[str]:
        """Yield a line per figure."""
        yield f"{self.units:,} units: {self.work:.1f} s, of which the driver {self.driver:.1f} s"
        yield f"  per unit {1e3 * self.work / self.units:.2f} ms, of the driver {1e3 * self.driver / self.units:.2f} ms"
        yield f"  a second call {self.again:.1f} s, {1e3 * self.again / self.units:.2f} ms per unit"
        yield f"  grown by {self.resident:.1f} MiB, of which Python's objects {self.python:.1f} MiB"


def measure(out: str, units: int, executor: Executor, payload: int = 0) -> Cost:
    """Send units of no work through the engine."""
    job = EmptyJob(checked(EmptySettings, {"out": out, "units": units, "payload": payload}))
    watched, memory = Watched(executor), Memory((units // 10, units))
    began = time.perf_counter()
    done = run(job, executor=watched, follow=memory)
    work = time.perf_counter() - began
    if done.done != units or done.headline != {"rows": units}:
        raise AssertionError(f"{done.done} of {units} units, {done.headline}")
    began = time.perf_counter()
    run(job, executor=watched)
    again = time.perf_counter() - began
    driver = work - watched.apart + (0.0 if isinstance(executor, LocalExecutor) else watched.processor)
    return Cost(units, work, driver, again, memory.growth("resident"), memory.growth("python"))


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@dataclass(frozen=True)
class Comparison:
    """Whole commands of this checkout and of another, timed in turn on one machine."""

    other: Path
    samples: int
    repeats: int

    def commands(self, out: Path, saved: Sequence[str]) -> dict[str, list[str]]:
        """Return the commands of one round, by what is timed; each goes on from those before it.

        `saved`: the option with which an edit is saved whatever else it changes.
        """
        run, edit = str(out / "run"), str(out / "edit")
        pool = ["--workers", "2"]
        census = ["--model", "demo", "--data", "demo", "--limit", str(self.samples), "--shard-size", "32"]
        change = ["--suppress", "broccoli", "--method", "zero", "--out", edit, *saved]
        measured = ["--edit", edit, "--data", "demo", "--limit", str(self.samples // 4), "--text-count", "0"]
        return {
            "census": ["census", *census, "--out", run, *pool],
            "properties": ["properties", run, "--concepts", "8", "--language", "en", *pool],
            "edit": ["edit", run, *change],
            "evaluation": ["evaluate", run, *measured, "--no-bleu", *pool],
            "demo --quick": ["demo", "--quick", "--out", str(out / "demo")],
        }

    def times(self) -> dict[str, dict[Path, list[float]]]:
        """Return the seconds of each command, by checkout; rounds alternate, and so does who is first."""
        checkouts = [Path(__file__).resolve().parents[2], self.other.resolve()]
        seconds: dict[str, dict[Path, list[float]]] = defaultdict(lambda: {checkout: [] for checkout in checkouts})
        for repeat in range(self.repeats):
            with tempfile.TemporaryDirectory() as folder:
                rounds = {
                    checkout: self.commands(Path(folder) / str(number), saving(checkout))
                    for number, checkout in enumerate(checkouts)
                }
                for what in rounds[checkouts[0]]:
                    for checkout in checkouts[:: -1 if repeat % 2 else 1]:
                        seconds[what][checkout].append(command_seconds(checkout, rounds[checkout][what]))
        return seconds

    def lines(self) -> Iterator[str]:
        """Yield a line per command: medians of here and there, and their ratio."""
        yield f"{'':14s}{'here':>8s}{'there':>8s}{'ratio':>7s}   {self.repeats} rounds"
        for what, by_checkout in self.times().items():
            here, there = (median(values) for values in by_checkout.values())
            yield f"{what:14s}{here:8.1f}{there:8.1f}{here / there:7.2f}"


def saving(checkout: Path) -> list[str]:
    """Return the option of a checkout with which every edit is saved; the earliest ones save it without."""
    option = "--allow-collateral"
    return [option] if option in run_command(checkout, ["edit", "--help"]).stdout else []


def command_seconds(checkout: Path, arguments: Sequence[str]) -> float:
    """Return the seconds of one command of a checkout; raises CalledProcessError where it fails."""
    began = time.perf_counter()
    run_command(checkout, arguments)
    return time.perf_counter() - began


def run_command(checkout: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one command of a checkout; raises CalledProcessError where it fails."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "200"}
    command = [sys.executable, "-m", "mmray", *arguments]
    return subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--payload", type=int, default=0, help="bytes of a unit's payload")
    parser.add_argument("--ray", action="store_true", help="on two actors of Ray")
    parser.add_argument("--trace", action="store_true", help="tell Python's objects apart, which is slow")
    parser.add_argument("--against", type=Path, help="another checkout, whose commands are timed next to these")
    parser.add_argument("--samples", type=int, default=256, help="of the census that is timed")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.against:
        print(*Comparison(asked.against, asked.samples, asked.repeats).lines(), sep="\n")
        return
    if asked.trace:
        tracemalloc.start()
    executor: Executor = LocalExecutor()
    if asked.ray:
        from mmray.engine.ray import RayExecutor

        executor = RayExecutor((2, 2), None, None)
    with tempfile.TemporaryDirectory() as folder:
        print(*measure(folder, asked.units, executor, asked.payload).lines(), sep="\n")


if __name__ == "__main__":
    main()
