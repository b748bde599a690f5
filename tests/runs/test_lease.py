"""One driver at a time: the second is refused while the first lives, and succeeds it once it does not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace

import pytest

from mmray.errors import InputError, OutageError
from mmray.runs.lease import LIFETIME, Owner, hold_lease, last_driver, this_process
from mmray.storage import Store
from tests.support.stores import Forgetful, Wrapped

SOON = {"renewed": 0.1, "lifetime": 0.8}


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list("lease/")]


def owner(store: Store, number: int) -> Owner:
    return Owner(**json.loads(store.read(f"lease/{number:06d}.json")))


def leave(store: Store, number: int, left: Owner) -> None:
    store.put(f"lease/{number:06d}.json", json.dumps(asdict(left)).encode())


def elsewhere(**changes: object) -> Owner:
    """A driver on another machine."""
    return replace(this_process(), host="elsewhere", machine="another", token="theirs", **changes)


def test_a_second_driver_is_refused_while_the_first_lives(store: Store) -> None:
    with hold_lease(store, **SOON), pytest.raises(InputError) as refusal, hold_lease(store, **SOON):
        raise AssertionError("two drivers")
    assert str(refusal.value).startswith(
        f"{store.uri}: another driver is at work on this run (process {os.getpid()} on "
    )
    assert "\n" not in str(refusal.value)
    with hold_lease(store, **SOON) as lease:
        lease.check()
    assert keys(store) == ["lease/000002.json"]


def test_a_lease_that_is_held_is_renewed(store: Store) -> None:
    with hold_lease(store, **SOON):
        time.sleep(0.5)
        assert owner(store, 1).beats >= 1
        assert not owner(store, 1).released
    assert owner(store, 1).released


def test_what_the_block_raises_releases_it(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), hold_lease(store, **SOON):
        raise KeyboardInterrupt
    with hold_lease(store, **SOON):
        pass


def test_a_driver_killed_on_this_machine_is_succeeded_at_once(store: Store) -> None:
    code = """
        import sys, time
        from mmray.runs.lease import hold_lease
        from mmray.storage import open_store
        with hold_lease(open_store(sys.argv[1])):
            print("holding", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), store.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "holding\n"
        with pytest.raises(InputError, match=f"process {driver.pid} on"), hold_lease(store):
            raise AssertionError("two drivers")
        driver.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with hold_lease(store):
        assert time.monotonic() - began < 5


def test_a_lease_that_could_not_be_released_binds_nobody(store: Store) -> None:
    class Gone(Wrapped):
        def put(self, key: str, data: bytes) -> None:
            raise OutageError("away")

    with hold_lease(Gone(store), **SOON):
        pass
    assert not owner(store, 1).released
    with hold_lease(store, renewed=0.1, lifetime=60):
        assert keys(store) == ["lease/000002.json"]


def test_a_process_number_used_again_is_no_driver(store: Store) -> None:
    leave(store, 7, replace(this_process(), pid=os.getppid(), started="long ago"))
    with hold_lease(store, **SOON):
        assert keys(store) == ["lease/000008.json"]


def test_a_driver_elsewhere_that_renews_is_alive(store: Store) -> None:
    leave(store, 1, elsewhere())
    stop = threading.Event()

    def renew() -> None:
        beats = 0
        while not stop.wait(0.1):
            beats += 1
            leave(store, 1, elsewhere(beats=beats))

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(InputError, match="on elsewhere"), hold_lease(store, renewed=0.1, lifetime=10):
            raise AssertionError("two drivers")
    finally:
        stop.set()
        renewing.join()


def test_a_driver_elsewhere_that_renews_nothing_is_dead(store: Store) -> None:
    leave(store, 1, elsewhere())
    began = time.monotonic()
    with hold_lease(store, **SOON):
        assert time.monotonic() - began >= SOON["lifetime"]
        assert keys(store) == ["lease/000002.json"]


def test_a_driver_elsewhere_that_ended_needs_no_waiting(store: Store) -> None:
    leave(store, 1, elsewhere(released=True))
    began = time.monotonic()
    with hold_lease(store, renewed=0.1, lifetime=60):
        assert time.monotonic() - began < 30


def test_of_many_that_succeed_one_does(store: Store) -> None:
    leave(store, 1, elsewhere())
    holding, most = [], 0
    lock = threading.Lock()
    together = threading.Barrier(4)

    def drive() -> None:
        nonlocal most
        together.wait()
        try:
            with hold_lease(store, **SOON):
                with lock:
                    holding.append(1)
                    most = max(most, len(holding))
                time.sleep(0.5)
                with lock:
                    holding.pop()
        except InputError:
            pass

    drivers = [threading.Thread(target=drive) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert most == 1


def test_a_driver_that_was_succeeded_is_told(store: Store) -> None:
    with hold_lease(store, **SOON) as lease:
        lease.check()
        leave(store, 2, elsewhere())
        until = time.monotonic() + 10
        with pytest.raises(InputError, match="another driver has taken the run over"):
            while time.monotonic() < until:
                lease.check()
                time.sleep(0.05)


def test_an_outage_does_not_end_a_driver(store: Store) -> None:
    class Away(Wrapped):
        away = False

        def put(self, key: str, data: bytes) -> None:
            if self.away:
                raise OutageError("away")
            super().put(key, data)

    flaky = Away(store)
    with hold_lease(flaky, **SOON) as lease:
        flaky.away = True
        time.sleep(0.4)
        lease.check()
        flaky.away = False
        time.sleep(0.4)
        lease.check()
        assert owner(store, 1).beats >= 1


def test_a_lost_answer_is_no_other_driver(store: Store) -> None:
    with hold_lease(Forgetful(store), **SOON) as lease:
        lease.verify()
        with pytest.raises(InputError, match="another driver"), hold_lease(store, **SOON):
            raise AssertionError("two drivers")
    assert keys(store) == ["lease/000001.json"]


@pytest.mark.parametrize("content", [b"", b'{"host": "x", "pi', b"[]", b'{"invented": 1}'])
def test_a_cut_lease_is_waited_for_and_then_succeeded(store: Store, content: bytes) -> None:
    store.put("lease/000001.json", content)
    with hold_lease(store, **SOON):
        assert keys(store) == ["lease/000002.json"]


def test_a_lease_of_a_later_version_is_read(store: Store) -> None:
    store.put("lease/000001.json", json.dumps(asdict(this_process()) | {"invented": 1, "released": True}).encode())
    with hold_lease(store, renewed=0.1, lifetime=60):
        assert keys(store) == ["lease/000002.json"]


def test_files_of_others_are_no_leases(store: Store) -> None:
    for name in (".DS_Store", "x.json", "000001.json.bak"):
        store.put(f"lease/{name}", b"\x00")
    with hold_lease(store, **SOON):
        assert "lease/000001.json" in keys(store)
    assert len(keys(store)) == 4


def test_a_driver_that_does_not_know_yet_that_it_was_succeeded_changes_nothing(store: Store) -> None:
    with hold_lease(store, renewed=60, lifetime=60) as lease:
        guarded = lease.guard(store)
        guarded.put("tables/a", b"mine")
        leave(store, 2, elsewhere())
        lease.check()
        for change in (
            lambda: guarded.put("tables/a", b"late"),
            lambda: guarded.commit("tables/b", b"late"),
            lambda: guarded.delete("tables/a"),
        ):
            with pytest.raises(InputError, match="another driver has taken the run over"):
                change()
        assert guarded.read("tables/a") == b"mine"
        assert not guarded.exists("tables/b")


def test_who_drove_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_driver(store) is None
    with hold_lease(store, **SOON):
        driver = last_driver(store)
        assert driver is not None
        assert (driver.pid, driver.state) == (os.getpid(), "at work")
    driver = last_driver(store)
    assert driver is not None and driver.state == "ended"
    leave(store, 2, replace(this_process(), pid=os.getppid(), started="long ago"))
    driver = last_driver(store)
    assert driver is not None and driver.state == "died"
    leave(store, 3, elsewhere())
    driver = last_driver(store)
    assert driver is not None and (driver.host, driver.state) == ("elsewhere", "at work")
    later = time.time() + LIFETIME + 60
    monkeypatch.setattr(time, "time", lambda: later)
    driver = last_driver(store)
    assert driver is not None and driver.state == "died"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pid": 1}'])
def test_a_lease_that_cannot_be_read_names_nobody(store: Store, content: bytes) -> None:
    store.put("lease/000001.json", content)
    assert last_driver(store) is None
