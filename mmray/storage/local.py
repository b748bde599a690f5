"""A folder of the local file system as a store: a temporary file, `fsync`, and a hard link to the name."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from mmray.storage.objects import Entry, check_key, too_large

Entries: TypeAlias = list[Entry]

TEMPORARY = ".tmp-"
"""How the names of files begin that are not complete yet."""


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
        """Return the whole file; ValueError for one of more bytes, unread, or for what is no regular file."""
        try:
            return read_file(self._path(key), most)
        except NotADirectoryError as error:
            raise FileNotFoundError(self._path(key)) from error

    def exists(self, key: str) -> bool:
        """Return whether the file is there."""
        return self._path(key).is_file()

    def entry(self, key: str) -> Entry | None:
        """Return the file's entry, or None if there is none."""
        return _entry(self._path(key), key)

    def list(self, prefix: str = "") -> list[Entry]:
        """Return every file whose key starts with `prefix`; temporary files are left out."""
        return self._entries(prefix, temporary=False)

    def leftovers(self) -> Sequence[Entry]:
        """Return the temporary files of killed writers, and of those that write just now."""
        return self._entries("", temporary=True)

    def _entries(self, prefix: str, *, temporary: bool) -> Entries:
        folder = self._path(prefix.rpartition("/")[0])
        root = os.fspath(self.root)
        entries = []
        for parent, _, names in os.walk(folder, onerror=_unless_gone):
            # A run of many units has as many folders: `Path` would take most of the time.
            inside = parent.removeprefix(root).strip(os.sep).replace(os.sep, "/")
            for name in names:
                key = f"{inside}/{name}" if inside else name
                if key.startswith(prefix) and name.startswith(TEMPORARY) == temporary:
                    entries.append(_entry(Path(parent, name), key))
        # A file may have gone since it was listed, or be a link to nothing.
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.key)

    def _temporary(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # `write` does not say where there was no room
            raise
        return temporary

    def commit(self, key: str, data: bytes) -> bool:
        """Create the file by linking a complete temporary one to its name; False if the name is taken."""
        path = self._path(key)
        temporary = self._temporary(path, data)
        try:
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
        temporary = self._temporary(path, data)
        try:
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def delete(self, key: str) -> None:
        """Remove the file if it is there."""
        path = self._path(key)
        if not path.is_dir():
            path.unlink(missing_ok=True)


def read_file(path: Path, most: int) -> bytes:
    """Return a file's bytes; raises ValueError for one of more than `most` bytes, and for a pipe or a device.

    Neither is read: a pipe without a writer would be waited for without end, and `/dev/zero` never ends.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > most:
            raise ValueError(too_large(status.st_size, most))
        return file.read(most)


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


def _unless_gone(error: OSError) -> None:
    # A folder that can't be read must not pass for an empty one.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_folder(folder: Path) -> None:
    # The new name itself is durable only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
