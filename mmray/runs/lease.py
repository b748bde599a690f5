"""Who drives a run: one process at a time, as long as it renews its lease.

`lease/000003.json` belongs to the third driver. Only its owner renews it; who takes the run over creates the next
number, which a store grants to one alone. Whether an owner elsewhere lives is seen from its renewals, by the watcher's
own clock: clocks of machines need not agree. Two drivers that slip through all the same harm nothing, for shards are
committed once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal
from uuid import uuid4

from mmray.errors import InputError, StorageError
from mmray.runs.receipts import known_fields
from mmray.storage import Store, WrappedStore, without_retries

RENEWED = 5.0
"""Seconds between two renewals."""
LIFETIME = 30.0
"""Seconds without a renewal after which an owner is taken for dead."""
KEY = re.compile(r"lease/(\d+)\.json")

_held: set[str] = set()
"""Tokens of the leases that this process holds or asks for. One that it could not release is not among them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease, and how often it has renewed it."""

    host: str
    pid: int
    machine: str
    """The machine's boot and the name space of its process numbers; empty where the system does not tell them."""
    started: str
    """When the process began, as the system counts it: process numbers are used again."""
    token: str
    """What tells leases of one process from each other."""
    beats: int = 0
    released: bool = False


UNKNOWN = Owner("an unknown machine", 0, "", "", "")
"""Stands for who wrote a lease that can't be read: whether it lives is seen from its renewals."""


class Lease:
    """A lease that is held."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.number = number
        self.lost = threading.Event()

    def __call__(self) -> None:
        """Raise InputError once the lease is known to be lost."""
        if self.lost.is_set():
            raise InputError(f"{self.store.uri}: another driver has taken the run over; leave it to that one")

    def look(self) -> None:
        """Look in storage, and raise InputError if the lease is lost: a process that was stopped does not know yet."""
        if _last(self.store) != self.number:
            self.lost.set()
        self()

    def guard(self, store: Store) -> Store:
        """Return the store with a look at the lease before each change."""
        return _GuardedStore(store, self)


class _GuardedStore(WrappedStore):
    """A store that checks a lease before each change, and refuses the change if it is lost."""

    def __init__(self, inner: Store, lease: Lease) -> None:
        super().__init__(inner)
        self.lease = lease

    def commit(self, key: str, data: bytes) -> bool:
        self.lease.look()
        return super().commit(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.lease.look()
        super().put(key, data)

    def delete(self, key: str) -> None:
        self.lease.look()
        super().delete(key)


def this_process() -> Owner:
    """Return this process as the owner of a lease."""
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _machine(), _started(pid) or "", uuid4().hex)


@contextmanager
def driving(store: Store, renewed: float = RENEWED, lifetime: float = LIFETIME) -> Iterator[Lease]:
    """Hold the run's lease for a block; what it yields is to be called now and then: it raises InputError once lost.

    Raises InputError if another driver is alive. One on this machine that is not any more is succeeded at once,
    one elsewhere after `lifetime` seconds in which it is seen to renew nothing.
    """
    owner = this_process()
    _held.add(owner.token)
    try:
        number = _take(store, owner, renewed, lifetime)
    except BaseException:
        _held.discard(owner.token)
        raise
    key, lease = _key(number), Lease(store, number)
    stop = threading.Event()
    # A renewal that fails is tried again soon, and a release that fails may be left out: neither is to be waited for.
    hasty = without_retries(store)

    def renew() -> None:
        beats = 0
        while not stop.wait(renewed):
            try:
                if _last(hasty) != number:
                    lease.lost.set()
                    return
                beats += 1
                hasty.put(key, _bytes(replace(owner, beats=beats)))
            except (OSError, StorageError) as error:
                logger.warning("lease of %s: not renewed (%s)", store.uri, error)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        _held.discard(owner.token)
        try:
            hasty.put(key, _bytes(replace(owner, released=True)))
        except (OSError, StorageError) as error:
            # It expires by itself; what the block raised matters more.
            logger.warning("lease of %s: not released (%s)", store.uri, error)


def _take(store: Store, owner: Owner, renewed: float, lifetime: float) -> int:
    while True:
        number = _last(store)
        before = _owner(store, number)
        if before is not None and not before.released:
            alive = _alive(before)
            if alive is None:
                logger.warning(
                    "%s: looking for %.0f s at most whether its driver on %s is alive", store.uri, lifetime, before.host
                )
                alive = _renews(store, number, before, lifetime, every=renewed / 5)
            if alive:
                raise InputError(
                    f"{store.uri}: another driver is at work on this run (process {before.pid} on {before.host}); "
                    "wait for it, or stop it first"
                )
        # A store whose answer was lost, and that was asked again, refuses what it has: it may be our own.
        if store.commit(_key(number + 1), _bytes(owner)) or _owner(store, number + 1) == owner:
            for entry in store.list("lease/"):
                if KEY.fullmatch(entry.key) and entry.key < _key(number + 1):
                    store.delete(entry.key)
            return number + 1


@dataclass(frozen=True)
class Driver:
    """The last process that has held a lease."""

    host: str
    pid: int
    state: Literal["at work", "ended", "died"]
    seen: float
    """When it last renewed or released the lease, in seconds since 1970 by the store's clock."""


def last_driver(store: Store) -> Driver | None:
    """Return who drives a run, or did last; None where nobody ever has, or the lease can't be read.

    Of a process elsewhere only its renewals are known: without one for LIFETIME, by this machine's clock, it has died.
    """
    number = _last(store)
    owner, entry = _owner(store, number), store.entry(_key(number))
    if owner is None or owner is UNKNOWN or entry is None:
        return None
    alive = _alive(owner)
    if alive is None:
        alive = time.time() - entry.modified < LIFETIME
    return Driver(owner.host, owner.pid, "ended" if owner.released else "at work" if alive else "died", entry.modified)


def _renews(store: Store, number: int, owner: Owner, within: float, every: float = RENEWED / 5) -> bool:
    """Watch a lease until it is renewed or followed (True), released, or the time is over."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        time.sleep(every)
        now = _owner(store, number)
        if _last(store) != number or now != owner:
            return now is None or not now.released
    return False


def _last(store: Store) -> int:
    matches = [KEY.fullmatch(entry.key) for entry in store.list("lease/")]
    return max((int(match[1]) for match in matches if match), default=0)


def _owner(store: Store, number: int) -> Owner | None:
    try:
        return Owner(**known_fields(Owner, json.loads(store.read(_key(number)))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return UNKNOWN


def _key(number: int) -> str:
    return f"lease/{number:06d}.json"


def _bytes(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _alive(owner: Owner) -> bool | None:
    """Tell whether the process drives the run; None if it is another machine's, or the system does not say."""
    if not owner.machine or owner.machine != _machine():
        return None
    if owner.pid == os.getpid():
        return owner.token in _held
    return _started(owner.pid) == owner.started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    try:
        # After the name in brackets, which may hold anything: the 22nd field in all, the state being the third.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
