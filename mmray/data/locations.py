"""Find the files that DATA names (a path, folder, glob or brace pattern, on disk or S3), read and identify them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar, cast

from mmray.data.images import LARGEST_FILE
from mmray.errors import InputError
from mmray.storage import Entry, LocalStore, filesystem, open_store

Item = TypeVar("Item")
Result = TypeVar("Result")

MIB = 1 << 20
SPECIAL = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
WILDCARDS = re.compile(r"(\*\*/|\*|\?|\[[^\]]*\])")
MEANINGS = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
THREADS = 8  # Fewer than the ten connections that an S3 client keeps open.
LONGEST_KEY = 1024
"""Longest key of an S3 object, in bytes."""
HIDDEN = re.compile(r"(^|/)[._]|(^|/)$")  # The second alternative is S3's marker of an empty folder.
LANDMARKS = ("metadata.{jsonl,csv}", "captions*.json", "annotations/captions*.json")
"""Files that identify a folder's data. Looked for first, because listing a million images takes minutes."""


@dataclass(frozen=True)
class DataLocation:
    """A folder, the files in it that are the data (sorted keys), and whether the user named the folder itself."""

    folder: str
    entries: tuple[Entry, ...]
    whole: bool = False


def find(data: str) -> DataLocation:
    """Return the files that `data` names: one file, a folder's files, or the matches of a glob or brace pattern.

    A folder's files are its `LANDMARKS`, or else all files below it except hidden ones (some part of the path starts
    with `.` or `_`). Raises `InputError` if the path doesn't exist, is empty, or an alternative of a brace pattern
    matches nothing.
    """
    if not data:
        raise InputError("DATA is empty; name a file, a folder or s3://BUCKET/PREFIX")
    remote = data.startswith("s3://")
    parent, _, name = data.rstrip("/").rpartition("/")
    # A bucket by itself has no parent to look into.
    if parent != "s3:/" and name not in ("", ".", ".."):
        folder = parent or ("/" if data.startswith("/") else ".")
        store = open_store(folder)
        if (found := store.entry(name)) is not None:
            return DataLocation(store.uri, (found,))
    is_folder = not remote and Path(data).expanduser().is_dir()
    # After looking for the path itself, whose name may contain a bracket.
    if not is_folder and SPECIAL.search(data):
        return _matches(data)
    store = open_store(data)
    for landmark in LANDMARKS:
        if landmarks := [item for pattern in expand_braces(landmark) for item in _glob(store.uri, pattern)]:
            return DataLocation(store.uri, tuple(landmarks), whole=True)
    entries = tuple(item for item in store.list() if not HIDDEN.search(item.key))
    if not entries:
        raise InputError(f"{data}: {'no files there' if is_folder else 'no such file or folder'}; check the path")
    return DataLocation(store.uri, entries, whole=True)


def join(folder: str, key: str) -> str:
    """Return the URI of a key below a folder."""
    return f"{folder.rstrip('/')}/{key}" if key else folder


def resolve(folder: str, path: str) -> str:
    """Return the URI of a path relative to a folder; `..` is the parent."""
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
    """Open a file for random access; raises `InputError` if it is missing or may not be read.

    On S3 each request fetches a mebibyte, so that neighbouring reads share one.
    """
    # pyarrow reads ranges of S3 objects; the store reads whole ones.
    system, path = filesystem(join(folder, key))
    try:
        return cast(BinaryIO, io.BufferedReader(system.open_input_file(path), MIB))
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{join(folder, key)}: can't be read ({error}); check the path and its permissions") from error


def identity(folder: str, found: Entry, whole: bool = False) -> str:
    """Return a digest of a file's content: its ETag on S3, else the SHA-256 of its size, first and last MiB.

    With `whole`, a local file is read completely. Raises `InputError` if it can't be read.
    """
    store = open_store(folder)
    if not isinstance(store, LocalStore):
        # The ETag; reading the object to hash it would cost a download.
        return found.version
    digest = hashlib.sha256(f"{found.size}\0".encode())
    try:
        with (store.root / found.key).open("rb") as file:
            if whole:
                while block := file.read(MIB):
                    digest.update(block)
            else:
                digest.update(file.read(MIB))
                # Parquet's footer is at the end, and changes with every rewrite.
                file.seek(max(0, found.size - MIB))
                digest.update(file.read(MIB))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; check the file and its permissions") from error
    return digest.hexdigest()


def fetch(folder: str, names: list[str]) -> list[bytes | str]:
    """Return the bytes of files below a folder, or a string that says why a name has none.

    Names and links that leave the folder are refused, and files larger than `LARGEST_FILE`. On S3 several files are
    fetched at once. An S3 outage is raised, not returned: it says nothing about the data.
    """
    store = open_store(folder)
    roots = link_roots(store.root) if isinstance(store, LocalStore) else ()

    def one(name: str) -> bytes | str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return f"image name {name!r} leaves the data's folder; give names below it, or the images' bytes"
        if not path.parts or "\0" in name or len(name.encode(errors="replace")) > LONGEST_KEY:
            return f"image name {name[:80]!r} can't be a file's"
        try:
            if isinstance(store, LocalStore) and escapes(store.root / path, roots):
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


def link_roots(root: Path) -> tuple[Path, ...]:
    """Return the folders that links below `root` may lead to; `root` itself must be free of links."""
    # A snapshot in the Hugging Face cache is a folder of links to the data set's blobs.
    parts = enumerate(root.parts)
    return (root, *(Path(*root.parts[:depth], "blobs") for depth, name in parts if name == "snapshots"))


def escapes(path: Path, roots: Iterable[Path]) -> bool:
    """Return whether a path, with links followed, lies outside all of these folders."""
    resolved = Path(os.path.realpath(path))  # Unlike `Path.resolve`, it does not raise for circular links.
    return not any(resolved.is_relative_to(root) for root in roots)


def is_outage(error: Exception) -> bool:
    """Return whether pyarrow's error is an S3 outage, which must end the attempt and not become failed rows."""
    return "AWS Error" in str(error) and not isinstance(error, FileNotFoundError)


@contextmanager
def store_errors(data: str) -> Iterator[None]:
    """Turn errors of the disk or S3, while data is opened, into an `InputError`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        raise InputError(f"{data}: can't be read ({error}); check path, permissions and endpoint") from error


def concurrently(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the function's results in the order of the items, computed by THREADS threads."""
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
    # S3 lists by prefix: the part before the first wildcard narrows the listing.
    expression = glob_expression(pattern)
    return [item for item in store.list(SPECIAL.split(pattern, maxsplit=1)[0]) if expression.fullmatch(item.key)]


def expand_braces(pattern: str) -> list[str]:
    """Return the expansions of `{a,b}` and `{000..003}` in a pattern, in order; ranges keep leading zeros."""
    parts = BRACES.split(pattern)
    choices = [_alternatives(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def glob_expression(pattern: str) -> re.Pattern[str]:
    """Return a glob as a regular expression, for S3: as in `pathlib`, `*` stays in a folder and `**/` crosses them."""
    expression = ""
    for piece in WILDCARDS.split(pattern):
        if len(piece) > 2 and piece.startswith("["):
            expression += "[^" + piece[2:] if piece[1] == "!" else piece
        else:
            expression += MEANINGS.get(piece, re.escape(piece))
    return re.compile(expression)


def _alternatives(inside: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds is None:
        return inside.split(",")
    first, last = bounds.groups()
    width = len(first) if first.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
