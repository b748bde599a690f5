"""How a pool of actors divides machines, and what reaches the terminal from Ray's native code."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.engine.session import MOST_WORKERS, MessageStream, actor_pool, held_back, ray_session
from mmray.errors import InputError

CPU_MACHINES = st.lists(st.tuples(st.integers(1, 130).map(float), st.just(0.0)), min_size=1, max_size=8)


@given(machines=CPU_MACHINES, workers=st.none() | st.integers(1, 300), units=st.integers(1, 500))
def test_workers_without_gpus_fit_their_machines(
    machines: list[tuple[float, float]], workers: int | None, units: int
) -> None:
    pool = actor_pool(workers and (workers, workers), None, machines, units)
    total = sum(cores for cores, _ in machines)
    assert pool.gpus == 0
    assert 1 <= pool.workers == pool.most <= units
    if workers is not None:
        assert pool.workers == min(workers, units)
    assert pool.threads >= 1
    assert 0 < pool.cores <= pool.threads
    assert pool.workers * pool.cores <= total + 1e-9
    # Every actor finds a machine with as many cores as it has threads, or shares one where there are too few.
    assert pool.threads == 1 or sum(int(cores // pool.threads) for cores, _ in machines) >= pool.workers
    if len(machines) == 1:
        assert pool.threads == max(1, int(total) // pool.workers)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([2], (2, 1)),
        ([1], (1, 1)),
        ([4], (4, 1)),
        ([16], (4, 4)),
        ([64], (4, 16)),
        ([16] * 10, (40, 4)),
        ([3, 8], (7, 1)),
    ],
)
def test_default_workers_are_at_most_four_a_machine(cores: list[int], expected: tuple[int, int]) -> None:
    pool = actor_pool(None, None, [(float(have), 0.0) for have in cores], 1000)
    assert (pool.workers, pool.threads) == expected
    assert MOST_WORKERS == 4


@given(
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    each=st.none() | st.sampled_from([0.25, 0.5, 1, 2, 4]),
    units=st.integers(1, 100),
)
def test_workers_with_gpus_fit_their_machines(gpus: list[int], each: float | None, units: int) -> None:
    machines = [(16.0, float(have)) for have in gpus]
    if each is not None and each > max(gpus):
        with pytest.raises(InputError, match="no machine of the cluster has more than"):
            actor_pool(None, each, machines, units)
        return
    pool = actor_pool(None, each, machines, units)
    assert pool.gpus == (each or 1)
    assert pool.workers == min(units, sum(int(have / pool.gpus) for have in gpus))


@given(machines=CPU_MACHINES, least=st.integers(1, 40), more=st.integers(1, 100), units=st.integers(1, 200))
def test_workers_that_grow_leave_each_other_room(
    machines: list[tuple[float, float]], least: int, more: int, units: int
) -> None:
    pool = actor_pool((least, least + more), None, machines, units)
    total = sum(cores for cores, _ in machines)
    assert (pool.workers, pool.most) == (min(least, units), min(least + more, units))
    # All of them fit where there are as many cores; else the first ones do, and the cluster is to grow.
    assert min(pool.most, max(pool.workers, int(total))) * pool.cores <= total + 1e-9


@given(gpus=st.lists(st.integers(0, 8), max_size=6), each=st.sampled_from([0.5, 1, 2, 4]), units=st.integers(1, 100))
def test_gpu_machines_may_be_yet_to_come(gpus: list[int], each: float, units: int) -> None:
    pool = actor_pool((1, 16), each, [(16.0, float(have)) for have in gpus], units)
    assert (pool.workers, pool.most, pool.gpus) == (1, min(16, units), each)


def test_gpus_that_are_not_there() -> None:
    for asked in (None, (3, 3)):
        with pytest.raises(InputError, match=r"--gpus-per-worker 1: no machine .* has more than 0; .*MIN:MAX"):
            actor_pool(asked, 1.0, [(2.0, 0.0)], 10)
    assert actor_pool(None, 0.0, [(2.0, 8.0)], 10).gpus == 0


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_without_a_cluster_is_told_soon(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray would be kept
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(port=free.getsockname()[1])
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"--address {address}: no Ray cluster there"), ray_session(address):
        raise AssertionError("there is a cluster")
    assert time.monotonic() - began < 5


def test_native_code_is_not_heard_unless_it_fails() -> None:
    code = """
        import os, sys
        from mmray.engine.session import held_back
        with held_back():
            os.write(2, b"noise")
        os.write(2, b"before ")
        try:
            with held_back():
                os.write(2, b"cause ")
                raise RuntimeError
        except RuntimeError:
            os.write(2, b"after")
    """
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert answer.stderr == "before cause after"


def test_holding_back_keeps_no_descriptor() -> None:
    before = os.dup(2)
    os.close(before)
    for _ in range(3):
        with held_back():
            pass
    after = os.dup(2)
    os.close(after)
    # The lowest free number is the same: nothing was left open.
    assert after == before


def test_messages_of_ray_leave_stdout_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    with redirect_stdout(MessageStream()):
        print("(raylet) A worker died", "unexpectedly")
        print("(raylet) Task failed. The actor is dead because it was killed by `ray.kill`.")
        print("(raylet) out of memory")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "(raylet) A worker died unexpectedly\n(raylet) out of memory\n"


def test_a_home_that_can_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system", "/home/nobody/.ray")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Nobody gave an address: none is blamed.
    said = r"^can't start a local Ray \(.*Read-only file system.*\); give it a HOME and a TMPDIR to write to$"
    with pytest.raises(InputError, match=said), ray_session(None):
        pass
