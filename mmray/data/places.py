"""Where data lies: files behind a path, folder, glob or brace pattern, on disk or on S3, and what identifies them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar, cast

from mmray.data.globbing import SPECIAL, expand_braces, glob_expression
from mmray.data.images import LARGEST_FILE
from mmray.errors import InputError
from mmray.storage import Entry, LocalStore, filesystem, open_store

Item = TypeVar("Item")
Result = TypeVar("Result")

MIB = 1 << 20
THREADS = 8  # Below the ten connections that an S3 client keeps open.
LONGEST_KEY = 1024
HIDDEN = re.compile(r"(^|/)[._]|(^|/)$")  # The last: S3's marker of an empty folder.
LANDMARKS = ("metadata.{jsonl,csv}", "captions*.json", "annotations/captions*.json")
"""Files that make a folder data without a look at the rest, which may be a million images; the first ones found do."""


@dataclass(frozen=True)
class DataLocation:
    """A folder, and which of its files are the data (keys below it, sorted); `whole` if the folder itself was named."""

    folder: str
    entries: tuple[Entry, ...]
    whole: bool = False


def find(data: str) -> DataLocation:
    """Return the files that `data` names: one file, a folder's, or those that a glob or brace pattern matches.

    Of a folder they are its `LANDMARKS`, or else all files below it but hidden ones (a part of the path starts with
    `.` or `_`). Raises `InputError` if there is no such path, or nothing in it, or a member of a brace pattern is
    missing.
    """
    if not data:
        raise InputError("DATA is empty; name a file, a folder or s3://BUCKET/PREFIX")
    remote = data.startswith("s3://")
    parent, _, name = data.rstrip("/").rpartition("/")
    if parent != "s3:/" and name not in ("", ".", ".."):
        folder = parent or ("/" if data.startswith("/") else ".")
        store = open_store(folder)
        if (found := store.entry(name)) is not None:
            return DataLocation(store.uri, (found,))
    is_folder = not remote and Path(data).expanduser().is_dir()
    if not is_folder and SPECIAL.search(data):
        return _matches(data)
    store = open_store(data)
    for landmark in LANDMARKS:
        if landmarks := [item for pattern in expand_braces(landmark) for item in _glob(store.uri, pattern)]:
            return DataLocation(store.uri, tuple(landmarks), whole=True)
    listed = tuple(item for item in store.list() if not HIDDEN.search(item.key))
    if not listed:
        raise InputError(f"{data}: {'no files there' if is_folder else 'no such file or folder'}; check the path")
    return DataLocation(store.uri, listed, whole=True)


def join(folder: str, key: str) -> str:
    """Return the URI of a key below a folder."""
    return f"{folder.rstrip('/')}/{key}" if key else folder


def beside(folder: str, path: str) -> str:
    """Return the URI of a path seen from a folder; `..` is the folder above."""
    for part in path.split("/"):
        folder = folder.rpartition("/")[0] if part == ".." else folder if part == "." else join(folder, part)
    return folder


def read(folder: str, key: str) -> bytes | None:
    """Return a file's bytes, or None if there is none."""
    try:
        return open_store(folder).read(key)
    except FileNotFoundError:
        return None


def stream(folder: str, key: str) -> BinaryIO:
    """Return a file to read at random; on S3 each request asks for a mebibyte, so that near reads share one.

    Raises `InputError` if it is gone or not ours to read.
    """
    system, path = filesystem(join(folder, key))
    try:
        return cast(BinaryIO, io.BufferedReader(system.open_input_file(path), MIB))
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{join(folder, key)}: can't be read ({error}); check the path and its permissions") from error


def identity(folder: str, found: Entry, whole: bool = False) -> str:
    """Return what identifies a file's content: its ETag on S3, else the SHA-256 of its size, first and last MiB.

    With `whole` a local file is read completely instead. Raises `InputError` if it can't be read.
    """
    store = open_store(folder)
    if not isinstance(store, LocalStore):
        return found.version
    digest = hashlib.sha256(f"{found.size}\0".encode())
    try:
        with (store.root / found.key).open("rb") as file:
            if whole:
                while block := file.read(MIB):
                    digest.update(block)
            else:
                digest.update(file.read(MIB))
                file.seek(max(0, found.size - MIB))
                digest.update(file.read(MIB))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; check the file and its permissions") from error
    return digest.hexdigest()


def fetch(folder: str, names: list[str]) -> list[bytes | str]:
    """Return the bytes of files below a folder, or, as a string, why a name has none.

    A name or a link that leaves the folder is refused, and so is a file of more than `LARGEST_FILE` bytes. On S3
    several are fetched at once, and an outage is raised rather than returned: it is no property of the data.
    """
    store = open_store(folder)
    homes = link_homes(store.root) if isinstance(store, LocalStore) else ()

    def one(name: str) -> bytes | str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return f"image name {name!r} leaves the data's folder; give names below it, or the images' bytes"
        if not path.parts or "\0" in name or len(name.encode(errors="replace")) > LONGEST_KEY:
            return f"image name {name[:80]!r} can't be a file's"
        try:
            if isinstance(store, LocalStore) and leaves(store.root / path, homes):
                return f"image {name!r} is a link that leaves the data's folder; copy what it links to"
            return store.read_at_most(str(path), LARGEST_FILE) or f"image {name!r} is empty"
        except ValueError as error:
            return f"image {name!r}: {error}"
        except FileNotFoundError:
            return f"no image {name!r} in {folder}"
        except OSError as error:
            if not isinstance(store, LocalStore):
                raise
            return f"image {name!r}: {error.strerror}"

    return [one(name) for name in names] if isinstance(store, LocalStore) else concurrently(one, names)


def link_homes(root: Path) -> tuple[Path, ...]:
    """Return the folders that links below `root`, a path without links, may lead to."""
    # A snapshot in the Hugging Face cache is a folder of links to the blobs of the same data set.
    parts = enumerate(root.parts)
    return (root, *(Path(*root.parts[:depth], "blobs") for depth, name in parts if name == "snapshots"))


def leaves(path: Path, homes: Iterable[Path]) -> bool:
    """Return whether a path leads out of all of these folders, its links followed."""
    resolved = Path(os.path.realpath(path))  # unlike `resolve`, without an error for links that go in a circle
    return not any(resolved.is_relative_to(home) for home in homes)


def is_outage(error: Exception) -> bool:
    """Return whether an error of pyarrow's is the store's: it must end the attempt, not become failed rows."""
    return "AWS Error" in str(error) and not isinstance(error, FileNotFoundError)


@contextmanager
def store_errors(data: str) -> Iterator[None]:
    """Turn what a disk or S3 refuses into an `InputError`, for the opening of data."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        raise InputError(f"{data}: can't be read ({error}); check path, permissions and endpoint") from error


def concurrently(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the function's results in the order of the items, some of them worked on at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _matches(data: str) -> DataLocation:
    plain = SPECIAL.split(data, maxsplit=1)[0]
    folder = plain.rpartition("/")[0] or ("/" if plain.startswith("/") else ".")
    rest = data if folder == "." else data[len(folder) :].lstrip("/")
    found: dict[str, Entry] = {}
    for pattern in expand_braces(rest):
        here = _glob(folder, pattern)
        if not here:
            what = join(folder, pattern)
            raise InputError(f"{data}: no file matches {what}; check the pattern, and quote it in a shell")
        found |= {item.key: item for item in here}
    return DataLocation(open_store(folder).uri, tuple(found[key] for key in sorted(found)))


def _glob(folder: str, pattern: str) -> list[Entry]:
    store = open_store(folder)
    if isinstance(store, LocalStore):
        keys = sorted(path.relative_to(store.root).as_posix() for path in store.root.glob(pattern))
        return [found for key in keys if (found := store.entry(key)) is not None]
    expression = glob_expression(pattern)
    return [item for item in store.list(SPECIAL.split(pattern, maxsplit=1)[0]) if expression.fullmatch(item.key)]
