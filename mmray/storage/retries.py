"""Retry storage requests during an outage or on a full disk, with exponential backoff and a deadline."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from mmray.errors import OutageError
from mmray.storage.named import NamedCommits
from mmray.storage.objects import Store, WrappedStore

RETRY_SECONDS = 600.0
"""How long a run's driver and workers wait for storage to answer again, or for room on a disk."""
LONGEST_PAUSE = 10.0
# pyarrow raises a plain OSError for every failure of S3: only its text tells an outage from a refusal.
TRANSIENT = re.compile(
    r"AWS Error (SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|THROTTLING)"
    r"|AWS Error .*HTTP status (429|5\d\d)"
)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk without room, or without room for this user."""

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def is_outage(error: Exception) -> bool:
    """Return whether an error comes from storage and passes by itself."""
    return isinstance(error, OutageError) or (isinstance(error, OSError) and TRANSIENT.search(str(error)) is not None)


def is_full(error: Exception) -> bool:
    """Return whether an error says that the disk is full; a user can make room while we wait."""
    return isinstance(error, OSError) and error.errno in FULL


def with_retries(action: Callable[[], Result]) -> Result:
    """Return the action's result; repeat it for up to RETRY_SECONDS in an outage or on a full disk, then raise."""
    deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
    while True:
        try:
            return action()
        except (OSError, OutageError) as error:
            left = deadline - time.monotonic()
            # Retries may nest. The inner loop uses up the whole time, so that the outer one is over as well and does
            # not start another ten minutes.
            if not (is_outage(error) or is_full(error)) or left <= 0:
                raise
            logger.warning("%s: again in %.0f s", error, min(pause, left))
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)


class RetryingStore(WrappedStore):
    """A store that retries requests during an outage or on a full disk, once it has answered one."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._answered = False

    def request(self, call: Callable[[], Result]) -> Result:
        """Make a call, with retries after the first success."""
        if self._answered:
            return with_retries(call)
        # Before that an outage may be a wrong address, which waiting does not fix: it is raised at once.
        result = call()
        self._answered = True
        return result


def without_retries(store: Store) -> Store:
    """Return the same store, but with every request made only once."""
    match store:
        case RetryingStore():
            return store.inner
        case NamedCommits():
            return NamedCommits(without_retries(store.inner))
    return store
