"""Sessions of Ray: join or start a cluster, keep it quiet, and divide its cores and GPUs among actors."""

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
"""Default number of workers per machine without GPUs; each holds a model in the machine's memory."""
GPU_THREADS = 4
"""Threads of a worker with GPUs, to decode images and prepare batches."""
REACHABLE_WITHIN = 10.0
"""Timeout in seconds for reaching a cluster; Ray itself would try for minutes."""


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start a local Ray that ends with the block; an existing session is reused.

    Raises InputError if there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's C++ core writes warnings to the terminal, which Python's logging settings don't stop.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Adopts Ray's future default for actors without GPUs, which silences the warning about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    # `ray job submit` passes the cluster in RAY_ADDRESS.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _reach(address)
        with held_back(), own_sigterm():
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
    with redirect_stdout(MessageStream()):
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            yield
        finally:
            ray.shutdown()


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep this program's SIGTERM handler, which `ray.init` replaces by one that exits with status 15."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        # The signal came during `ray.init`: Ray's handler has caught it.
        if callable(own) and ended.code == signal.SIGTERM:
            own(signal.SIGTERM, None)
        raise
    finally:
        if callable(own) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


class MessageStream(io.TextIOBase):
    """Sends what Ray prints on stdout, such as deaths of workers, to stderr, because stdout is for results."""

    def __init__(self) -> None:
        self.line = ""

    def write(self, text: str) -> int:
        """Pass on every whole line, except for actors that were ended on purpose."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            # Ray reports actors that Ray Data itself ends as failures, too.
            if "killed by `ray.kill`" not in line:
                sys.stderr.write(f"{line}\n")
        return len(text)


@dataclass(frozen=True)
class Pool:
    """Minimum and maximum number of actors, and the share of a machine that each gets."""

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
    requested: tuple[int, int] | None, gpus_each: float | None, machines: Sequence[tuple[float, float]], units: int
) -> Pool:
    """Return the pool for `units` units; `requested` (minimum, maximum) and `gpus_each` are the user's, or None.

    Raises InputError if an actor needs more GPUs than any machine has, unless the pool may grow: then the cluster may
    grow, too.
    """
    gpus = sum(have for _, have in machines)
    if gpus_each is None:
        gpus_each = float(gpus > 0)
    # An autoscaler may add machines for a growing pool, so that what is there now is no limit.
    growing = requested is not None and requested[0] < requested[1]
    if gpus_each:
        # Per machine: an actor's GPUs must be on one machine.
        fitting = sum(int(have / gpus_each) for _, have in machines)
        if not fitting and not growing:
            most = max((have for _, have in machines), default=0.0)
            raise InputError(
                f"--gpus-per-worker {gpus_each:g}: no machine of the cluster has more than {most:g}; where the cluster "
                "is to add machines, say --workers MIN:MAX"
            )
        # No more actors than units: the others would load a model and then idle.
        least, most_workers = (min(number, units) for number in requested or (fitting, fitting))
        return Pool(least, most_workers, GPU_THREADS, 1.0, gpus_each)
    cores = [have for have, _ in machines]
    # Many actors of one thread are faster than one actor of many threads.
    default = max(1, sum(min(int(have), MOST_WORKERS) for have in cores))
    least, most_workers = (min(number, units) for number in requested or (default, default))
    # A pool that may grow divides the cores by the number of actors that fit in the end.
    workers = most_workers if not growing else max(least, min(most_workers, int(sum(cores))))
    threads = max(1, int(sum(cores) / workers))
    # An actor can't combine the remaining cores of two machines.
    while threads > 1 and sum(int(have / threads) for have in cores) < workers:
        threads -= 1
    # Rounded down, so that shares of a core never add up to more than one core.
    return Pool(least, most_workers, threads, min(float(threads), int(100 * sum(cores) / workers) / 100), 0.0)


def _reach(address: str) -> None:
    """Raise OSError unless HOST:PORT accepts connections; other addresses, such as `auto`, are left to Ray."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_WITHIN).close()


@contextmanager
def held_back() -> Iterator[None]:
    """Hide what native code writes to stderr, unless the block fails: then it may explain the failure."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        # Redirect the file descriptor: native code bypasses `sys.stderr`.
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(terminal, hidden.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
