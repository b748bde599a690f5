"""Ray itself: joined or started, quiet, what it has to offer, and how a pool of actors divides that."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import ray

from mmray.errors import InputError

MOST_WORKERS = 4
"""Workers a machine without GPUs gets by default: each holds a model, and memory is shared."""
GPU_THREADS = 4
"""Threads of a worker that has GPUs: they decode images and prepare batches."""
REACHABLE_WITHIN = 10.0
"""Seconds that a cluster's address is given to answer; Ray itself would try for minutes."""


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start a local Ray that ends with the block; one that runs already is kept.

    Raises InputError where there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's C++ core writes warnings of its own to the terminal, which no Python logging setting stops.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    # A job that `ray job submit` started finds its cluster in RAY_ADDRESS.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _reach(address)
        with _held_back(), _own_sigterm():
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if address == "local":
            raise InputError(f"can't start a local Ray ({reason}); give it a HOME and a TMPDIR to write to") from error
        raise InputError(f"--address {address}: no Ray cluster there ({reason})") from error
    with redirect_stdout(_Messages()):
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this program's handler of SIGTERM, if it has one: Ray puts one in its place that exits with status 15."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        if callable(own) and ended.code == signal.SIGTERM:
            own(signal.SIGTERM, None)
        raise
    finally:
        if callable(own) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


class _Messages(io.TextIOBase):
    """Takes what Ray prints on stdout, such as the deaths of workers, to stderr: stdout is for results.

    Actors that Ray Data itself ends, at the end or an interruption, are reported as failures too: not those.
    """

    def __init__(self) -> None:
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if "killed by `ray.kill`" not in line:
                sys.stderr.write(f"{line}\n")
        return len(text)


@dataclass(frozen=True)
class Pool:
    """How many actors there are, at least and at most, and what each has of its machine."""

    workers: int
    most: int
    threads: int
    cores: float
    gpus: float


def machines() -> list[tuple[float, float]]:
    """Return (CPU cores, GPUs) of every machine of the cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]


def actor_pool(
    asked: tuple[int, int] | None, gpus_each: float | None, machines: Sequence[tuple[float, float]], units: int
) -> Pool:
    """Return the pool for so many units of work; `asked` (fewest, most) and `gpus_each` are the user's, or None.

    Without GPUs, actors of one thread are faster than one actor of many. Raises InputError where GPUs are asked for
    that no machine has, unless the number of workers may grow: so may the cluster then.
    """
    gpus = sum(have for _, have in machines)
    if gpus_each is None:
        gpus_each = float(gpus > 0)
    growing = asked is not None and asked[0] < asked[1]
    if gpus_each:
        fitting = sum(int(have / gpus_each) for _, have in machines)
        if not fitting and not growing:
            most = max((have for _, have in machines), default=0.0)
            raise InputError(
                f"--gpus-per-worker {gpus_each:g}: no machine of the cluster has more than {most:g}; where the cluster "
                "is to add machines, say --workers MIN:MAX"
            )
        least, most_workers = (min(number, units) for number in asked or (fitting, fitting))
        return Pool(least, most_workers, GPU_THREADS, 1.0, gpus_each)
    cores = [have for have, _ in machines]
    default = max(1, sum(min(int(have), MOST_WORKERS) for have in cores))
    least, most_workers = (min(number, units) for number in asked or (default, default))
    # Each gets its part of the cores that there are when all have come.
    workers = most_workers if not growing else max(least, min(most_workers, int(sum(cores))))
    threads = max(1, int(sum(cores) / workers))
    # An actor lies on one machine: it can't have the cores that two others have left.
    while threads > 1 and sum(int(have / threads) for have in cores) < workers:
        threads -= 1
    # Rounded down, so that parts of a core add up to no more than the core.
    return Pool(least, most_workers, threads, min(float(threads), int(100 * sum(cores) / workers) / 100), 0.0)


def _reach(address: str) -> None:
    """Raise OSError unless something answers at HOST:PORT; names such as `auto` and `local` are Ray's to find."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_WITHIN).close()


@contextmanager
def _held_back() -> Iterator[None]:
    """Keep what native code writes to the terminal from it, unless the block fails: then it may say why."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            written.seek(0)
            os.write(terminal, written.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
