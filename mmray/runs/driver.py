"""Drive a run or an analysis of one: hold its lease, and have what is found damaged meanwhile done again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmray.errors import InputError
from mmray.runs.folder import DamagedUnitError, RunFolder
from mmray.runs.lease import Lease, driving
from mmray.storage import Store


@contextmanager
def drive(folder: RunFolder) -> Iterator[Lease]:
    """Hold the lease of a folder for a block; raises InputError if another driver is alive.

    A damaged unit that is found in the block ends it, in one line; the same command does the unit again.
    """
    with driving(folder.store) as lease:
        try:
            yield lease
        except DamagedUnitError as damage:
            lease.look()
            damage.discard()
            raise InputError(f"{damage.what}: run the same command again") from damage


@contextmanager
def drive_analysis(uri: str) -> Iterator[Lease]:
    """Hold the lease of an analysis whose folders are below a local path or `s3://bucket/prefix`; else as `drive`."""
    with drive(_prepared(uri)) as lease:
        yield lease


def open_target(uri: str) -> Store:
    """Return the store that a driver writes tables to: how it commits is found out where it lies now."""
    return _prepared(uri).store


def _prepared(uri: str) -> RunFolder:
    folder = RunFolder.at(uri)
    folder.prepare()
    return folder
