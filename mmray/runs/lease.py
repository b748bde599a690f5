"""The lease of a run: one process at a time drives it, for as long as it renews its lease.

`lease/000003.json` belongs to the third driver, and only its owner renews it. A successor creates the next number,
which the store grants only once. Owners on other machines are alive while their renewals continue, timed by the
observer's own clock, because clocks of machines differ. Two drivers at once would do no harm: shards are committed
once.
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
"""Seconds without a renewal after which an owner counts as dead."""
KEY = re.compile(r"lease/(\d+)\.json")

_held: set[str] = set()
"""Tokens of the leases that this process holds or is acquiring; without those that it failed to release."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease; this is the content of the lease's file."""

    host: str
    pid: int
    machine: str
    """Boot id and process namespace of the machine; empty if the system does not provide them."""
    started: str
    """Start time of the process in the system's count, because process numbers are reused."""
    token: str
    """Unique per lease, because one process may hold several."""
    beats: int = 0
    """Renewals so far."""
    released: bool = False


UNKNOWN = Owner("an unknown machine", 0, "", "", "")
"""Owner of an unreadable lease; only its renewals show whether it is alive."""


class Lease:
    """A lease that is held."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.number = number
        self.lost = threading.Event()

    def check(self) -> None:
        """Raise InputError once the lease is known to be lost."""
        if self.lost.is_set():
            raise InputError(f"{self.store.uri}: another driver has taken the run over; leave it to that one")

    def verify(self) -> None:
        """Check the lease in storage, and raise InputError if it is lost."""
        # A process that was suspended, such as by SIGSTOP, has not noticed yet that another one took over.
        if _last(self.store) != self.number:
            self.lost.set()
        self.check()

    def guard(self, store: Store) -> Store:
        """Return the store with a check of the lease before each change."""
        return _GuardedStore(store, self)


class _GuardedStore(WrappedStore):
    """A store that checks a lease before each change, and refuses the change if it is lost."""

    def __init__(self, inner: Store, lease: Lease) -> None:
        super().__init__(inner)
        self.lease = lease

    def commit(self, key: str, data: bytes) -> bool:
        self.lease.verify()
        return super().commit(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.lease.verify()
        super().put(key, data)

    def delete(self, key: str) -> None:
        self.lease.verify()
        super().delete(key)


def this_process() -> Owner:
    """Return this process as the owner of a lease."""
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _machine(), _started(pid) or "", uuid4().hex)


@contextmanager
def hold_lease(store: Store, renewed: float = RENEWED, lifetime: float = LIFETIME) -> Iterator[Lease]:
    """Hold the run's lease during a block, renewing it every `renewed` seconds in a thread.

    Call `check` of the lease now and then: it raises InputError once the lease is lost. Raises InputError if another
    driver is alive. A dead driver on this machine is succeeded at once, one elsewhere after `lifetime` seconds without
    a renewal.
    """
    # Before the lease exists: from then on, another thread may ask whether its owner is alive.
    owner = this_process()
    _held.add(owner.token)
    try:
        number = _acquire(store, owner, renewed, lifetime)
    except BaseException:
        _held.discard(owner.token)
        raise
    key, lease = _key(number), Lease(store, number)
    stop = threading.Event()
    # No retries: a failed renewal is repeated soon anyway, and a failed release must not delay the exit.
    direct = without_retries(store)

    def renew() -> None:
        beats = 0
        while not stop.wait(renewed):
            try:
                if _last(direct) != number:
                    lease.lost.set()
                    return
                beats += 1
                direct.put(key, _bytes(replace(owner, beats=beats)))
            except (OSError, StorageError) as error:
                logger.warning("lease of %s: not renewed (%s)", store.uri, error)

    # A daemon: it must not keep a dying process alive, with its lease renewed.
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        _held.discard(owner.token)
        try:
            direct.put(key, _bytes(replace(owner, released=True)))
        except (OSError, StorageError) as error:
            # The lease expires by itself, and this must not hide an exception of the block.
            logger.warning("lease of %s: not released (%s)", store.uri, error)


def _acquire(store: Store, owner: Owner, renewed: float, lifetime: float) -> int:
    while True:
        number = _last(store)
        holder = _owner(store, number)
        if holder is not None and not holder.released:
            alive = _is_alive(holder)
            if alive is None:
                logger.warning(
                    "%s: waiting up to %.0f s to see whether its driver on %s is alive",
                    store.uri,
                    lifetime,
                    holder.host,
                )
                alive = _is_renewed(store, number, holder, lifetime, every=renewed / 5)
            if alive:
                raise InputError(
                    f"{store.uri}: another driver is at work on this run (process {holder.pid} on {holder.host}); "
                    "wait for it, or stop it first"
                )
        # A commit retried after a lost response finds its own object.
        if store.commit(_key(number + 1), _bytes(owner)) or _owner(store, number + 1) == owner:
            # Only the highest number counts; earlier leases are over.
            for entry in store.list("lease/"):
                if KEY.fullmatch(entry.key) and entry.key < _key(number + 1):
                    store.delete(entry.key)
            return number + 1


@dataclass(frozen=True)
class Driver:
    """The last process that held a lease."""

    host: str
    pid: int
    state: Literal["at work", "ended", "died"]
    seen: float
    """Time of its last renewal or release, in seconds since 1970 by the store's clock."""


def last_driver(store: Store) -> Driver | None:
    """Return who drives a run, or did last; None if nobody ever has, or the lease can't be read.

    A process on another machine counts as dead after LIFETIME without a renewal, by this machine's clock.
    """
    number = _last(store)
    owner, entry = _owner(store, number), store.entry(_key(number))
    if owner is None or owner is UNKNOWN or entry is None:
        return None
    alive = _is_alive(owner)
    if alive is None:
        alive = time.time() - entry.modified < LIFETIME
    return Driver(owner.host, owner.pid, "ended" if owner.released else "at work" if alive else "died", entry.modified)


def _is_renewed(store: Store, number: int, owner: Owner, within: float, every: float = RENEWED / 5) -> bool:
    """Return whether a lease is renewed or succeeded by another within that many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
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


def _is_alive(owner: Owner) -> bool | None:
    """Return whether the process drives the run; None if it is on another machine, or the system can't say."""
    # A process id means something only within the same boot and process namespace.
    if not owner.machine or owner.machine != _machine():
        return None
    if owner.pid == os.getpid():
        # This process is alive, but may have failed to release the lease earlier.
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
        # Start time is field 22 of `proc(5)`, state is field 3. Split after the command name in parentheses (field 2),
        # which may contain spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie drives nothing any more.
    return None if fields[0] == "Z" else fields[19]
