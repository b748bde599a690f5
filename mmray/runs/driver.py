"""Drive a run or one of its analyses: hold its lease, and discard units that turn out to be damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmray.errors import InputError
from mmray.runs.folder import DamagedUnitError, RunFolder
from mmray.runs.lease import Lease, hold_lease
from mmray.storage import Store


@contextmanager
def drive(folder: RunFolder) -> Iterator[Lease]:
    """Hold the lease of a folder during a block; raises InputError if another driver is alive.

    A damaged unit found in the block raises InputError after its receipt is removed; a rerun does the unit again.
    """
    with hold_lease(folder.store) as lease:
        try:
            yield lease
        except DamagedUnitError as damage:
            # Without the lease another driver is at work, and may have had the unit done again.
            lease.verify()
            damage.discard()
            raise InputError(f"{damage.what}: run the same command again") from damage


@contextmanager
def drive_analysis(uri: str) -> Iterator[Lease]:
    """Hold the lease of an analysis whose units are under a local path or `s3://bucket/prefix`; see `drive`."""
    with drive(_prepared(uri)) as lease:
        yield lease


def open_target(uri: str) -> Store:
    """Return the store that a driver writes tables to, after detecting how it commits."""
    return _prepared(uri).store


def _prepared(uri: str) -> RunFolder:
    folder = RunFolder.at(uri)
    folder.prepare()
    return folder
