"""Ray's workers as forks of one process that has everything imported: each is there at once, and costs next to nothing.

A worker imports Ray, torch and transformers for five seconds before it does anything. Nodes that are started while
`forked_workers` is open run this file for each worker instead. It asks the server for a fork, which becomes the worker
that Ray asked for (its arguments, environment, folder and open files), and lives as long as that does.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "MMRAY_TEST_FORKS"
"""Names the variable that tells nodes, and thus whoever starts a worker, where the server listens."""


FORK = "fork "
"""How the name of a process begins that stands for a fork; the fork's number follows."""


@contextmanager
def forked_workers() -> Iterator[None]:
    """Have all nodes of Ray that this process starts within the block take their workers from a server of forks."""
    import subprocess
    import tempfile

    import pytest

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        address = f"{folder}/forks"
        server = subprocess.Popen([sys.executable, __file__, "serve", address], stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        patch.setenv(ADDRESS, address)
        use(patch.setattr)
        try:
            yield
        finally:
            server.kill()
            server.wait()


def use(put: Callable[[object, str, object], None] = setattr) -> None:
    """Have nodes of Ray that this process starts take their workers from the server that it, or its parent, has."""
    from ray._private import ray_constants

    # A process may be older than the server, and not know of it.
    if ADDRESS in os.environ:
        put(ray_constants, "SETUP_WORKER_FILENAME", str(Path(__file__).resolve()))


def ask(arguments: list[str]) -> None:
    """Be what Ray starts as a worker: have a fork do it, and wait for its end."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        asked = json.dumps([arguments, dict(os.environ), str(Path.cwd())])
        socket.send_fds(server, [asked.encode()], [0, 1, 2])
        server.shutdown(socket.SHUT_WR)
        Path("/proc/self/comm").write_text(FORK + server.recv(16).decode())
        server.recv(1)  # nothing comes until the fork has ended


def serve(address: str) -> None:
    """Import what workers need, then become a worker for each process that asks: only forks return."""
    import torchvision  # noqa: F401

    import mmray.features.pipeline.job
    import mmray.neurons.model  # noqa: F401

    assert "ray" not in sys.modules

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        signal.signal(signal.SIGCHLD, reap)
        print("listening", flush=True)
        while True:
            asking, _ = listening.accept()
            if os.fork() == 0:
                break
            asking.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become(asking)


def reap(*_: object) -> None:
    """Let go of forks that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def become(asking: socket.socket) -> None:
    """Be the worker that another process was started as."""
    import argparse
    import runpy

    asked, files, _, _ = socket.recv_fds(asking, 1 << 20, 3)
    while more := asking.recv(1 << 20):
        asked += more
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    arguments, environment, folder = json.loads(asked)
    asking.sendall(str(os.getpid()).encode())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # Not earlier: Ray reads the environment as it is imported.
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    # As in Ray's own file of this kind.
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    known, sys.argv = parser.parse_known_args(arguments)
    update_envs(RuntimeEnvContext.deserialize(known.serialized_runtime_env_context).env_vars)
    # The other end of `asking` sees it closed as this process ends.
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(sys.argv[1:])
