"""Wait out an outage of storage or a full disk: the same request again, less and less often, until patience ends."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmray.errors import OutageError
from mmray.storage.objects import Entry, Store

PATIENCE = 600.0
"""Seconds for which a run's driver and workers wait for storage to answer again, or for room on a disk."""
LONGEST_PAUSE = 10.0
PASSING = re.compile(
    r"AWS Error (SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|THROTTLING)"
    r"|AWS Error .*HTTP status (429|5\d\d)"
)
"""What pyarrow, which knows no kinds of errors, writes of an outage of S3."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room left, or none for this user."""

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def is_outage(error: Exception) -> bool:
    """Return whether an error is storage's and passes by itself."""
    return isinstance(error, OutageError) or (isinstance(error, OSError) and PASSING.search(str(error)) is not None)


def is_full(error: Exception) -> bool:
    """Return whether an error is that of a disk without room, which somebody may make."""
    return isinstance(error, OSError) and error.errno in FULL


def with_retries(action: Callable[[], Result]) -> Result:
    """Return what the action returns; in an outage or on a full disk do it again, for PATIENCE seconds, then raise."""
    until, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return action()
        except (OSError, OutageError) as error:
            left = until - time.monotonic()
            # All of the time is used: where an action contains another, the outer one's is then over too.
            if not (is_outage(error) or is_full(error)) or left <= 0:
                raise
            logger.warning("%s: again in %.0f s", error, min(pause, left))
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)


class RetryingStore:
    """A store whose requests wait out an outage or a full disk, once it has answered one.

    Until then an outage may be a wrong address, which no waiting helps: it is raised at once.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri = inner.uri
        self._answered = False

    def _request(self, action: Callable[[], Result]) -> Result:
        if self._answered:
            return with_retries(action)
        found = action()
        self._answered = True
        return found

    def read(self, key: str) -> bytes:
        """Return the whole object; `FileNotFoundError` if there is none."""
        return self._request(lambda: self.inner.read(key))

    def exists(self, key: str) -> bool:
        """Return whether the object is there."""
        return self._request(lambda: self.inner.exists(key))

    def entry(self, key: str) -> Entry | None:
        """Return the object's entry, or None if there is none."""
        return self._request(lambda: self.inner.entry(key))

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object whose key starts with `prefix`, in order of key."""
        return self._request(lambda: self.inner.list(prefix))

    def commit(self, key: str, data: bytes) -> bool:
        """Create the object; False, and nothing changed, if it already exists."""
        return self._request(lambda: self.inner.commit(key, data))

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object, whole or not at all."""
        self._request(lambda: self.inner.put(key, data))

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        self._request(lambda: self.inner.delete(key))

    def leftovers(self) -> Sequence[Entry]:
        """Return what killed writers left half-written; no other method shows it, and `delete` removes it."""
        return self._request(self.inner.leftovers)
