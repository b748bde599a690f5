"""A folder of the local file system as a store: a temporary file, `fsync`, then a hard link to the final name."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

from mmray.storage.objects import Entry, check_key, too_large

TEMPORARY = ".tmp-"
"""Prefix of the names of incomplete files."""


class LocalStore:
    """A folder of the local (or a mounted) file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def _path(self, key: str) -> Path:
        check_key(key, self.uri)
        return self.root / key

    def read(self, key: str) -> bytes:
        """Return the whole file; `FileNotFoundError` if there is none."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(path) from error

    def read_at_most(self, key: str, most: int) -> bytes:
        """Return the whole file; ValueError, before reading it, if it is larger or not a regular file."""
        try:
            return read_file(self._path(key), most)
        except NotADirectoryError as error:
            raise FileNotFoundError(self._path(key)) from error

    def exists(self, key: str) -> bool:
        """Return whether the file exists."""
        return self._path(key).is_file()

    def entry(self, key: str) -> Entry | None:
        """Return the file's entry, or None if there is none."""
        return _entry(self._path(key), key)

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every file whose key starts with `prefix`, without temporary files."""
        return _entries(self.root, self._path(prefix.rpartition("/")[0]), prefix, temporary=False)

    def incomplete_writes(self) -> Sequence[Entry]:
        """Return all temporary files: those of killed writers, and those being written right now."""
        return _entries(self.root, self.root, "", temporary=True)

    def commit(self, key: str, data: bytes) -> bool:
        """Create the file by linking a complete temporary one to its name; False if the name is taken."""
        path = self._path(key)
        temporary = _write_temporary(path, data)
        try:
            # Unlike a rename, a link fails if the name exists: this is what makes a commit happen only once.
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the file by renaming a complete temporary one."""
        path = self._path(key)
        temporary = _write_temporary(path, data)
        try:
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def delete(self, key: str) -> None:
        """Remove the file if it exists."""
        path = self._path(key)
        if not path.is_dir():
            path.unlink(missing_ok=True)


def read_file(path: Path, most: int) -> bytes:
    """Return a file's bytes; raises ValueError, without reading, for more than `most` bytes, a pipe or a device."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would block forever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > most:
            raise ValueError(too_large(status.st_size, most))
        return file.read(most)


def _write_temporary(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # The bytes must be on disk before the name: a power cut could otherwise leave an empty committed file.
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # `write` does not say which disk is full
        raise
    return temporary


def _entries(root: Path, folder: Path, prefix: str, *, temporary: bool) -> list[Entry]:
    start = os.fspath(root)
    entries = []
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        # Plain strings: a run has a folder per unit, and building a `Path` for each would take most of the time.
        inside = parent.removeprefix(start).strip(os.sep).replace(os.sep, "/")
        for name in names:
            key = f"{inside}/{name}" if inside else name
            if key.startswith(prefix) and name.startswith(TEMPORARY) == temporary:
                entries.append(_entry(Path(parent, name), key))
    # A file may have been removed since it was listed, or be a broken link.
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.key)


def _entry(path: Path, key: str) -> Entry | None:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    if not stat.S_ISREG(status.st_mode):
        return None
    return Entry(key, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", status.st_mtime_ns / 1e9)


def _raise_unless_gone(error: OSError) -> None:
    # An unreadable folder must not look like an empty one: its units would be computed again.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_folder(folder: Path) -> None:
    # A new name survives a power cut only once its folder is on disk, too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
