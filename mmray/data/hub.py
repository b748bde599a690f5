"""`hf:NAME[:SPLIT]`: a data set of the Hugging Face hub or a local folder, read by the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from mmray.data.arrow import kinds_of_schema, records_of
from mmray.data.columns import Columns, Kind, detect
from mmray.data.hub_files import check_files
from mmray.data.images import LARGEST_FILE
from mmray.data.locations import DataLocation, escapes
from mmray.data.rows import Record
from mmray.data.source import DataFile, Source
from mmray.errors import InputError
from mmray.storage import read_file

PREFIX = "hf:"
ROWS_AT_ONCE = 32
NAMES_AT_ONCE = 65536
DEFAULT_SPLIT = "train"
CACHED_SETS = 4


@dataclass(frozen=True)
class HubSource(Source):
    """One split. As a file, its path is the split's name and its digest the fingerprint from `datasets`."""

    kind: ClassVar[str] = "hub"

    name: str
    split: str

    def files(self) -> list[DataFile]:
        """Return the split as one file; its size is that of the Arrow data."""
        dataset = load(self.name, self.split)
        rows = self.samples_in(self.split, dataset.num_rows)
        return [DataFile(self.split, rows, dataset.data.nbytes, dataset._fingerprint)]

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of the split; images stay encoded."""
        dataset = load(self.name, path)
        for first in range(start, min(stop, dataset.num_rows), ROWS_AT_ONCE):
            batch = _table(dataset, self.columns)[first : min(stop, first + ROWS_AT_ONCE)]
            rows = (_with_names(record, dataset.features) for record in records_of(batch))
            yield from ((f"{path}#{row}", record) for row, record in enumerate(rows, first))

    def fetch(self, path: str, names: list[str]) -> list[bytes | str]:
        """Return images that `datasets` left as files, from the local folder or its caches; nothing else is read."""
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        folders = [datasets.config.HF_CACHE_HOME, HF_HUB_CACHE, self.location.folder]
        roots = [Path(folder).resolve() for folder in folders if folder]

        def one(name: str) -> bytes | str:
            # Names come from the data set, and could point at any file.
            file = (Path(self.location.folder) / name).absolute()
            if ".." in file.parts or escapes(file, roots):
                return f"image name {name!r} leaves the data's folder"
            try:
                return read_file(file, LARGEST_FILE) or f"image {name!r} is empty"
            except (OSError, ValueError) as error:
                return f"no image {name!r} ({error})"

        return [one(name) for name in names]

    def object_cells(self) -> Iterable[Any]:
        """Yield the cells of the objects column; no other column is read."""
        dataset = load(self.name, self.split)
        # Arrow slices of one column: no image is touched.
        table = _table(dataset, Columns(objects=self.columns.objects))
        for first in range(0, dataset.num_rows, NAMES_AT_ONCE):
            yield from table[first : first + NAMES_AT_ONCE].column(0).to_pylist()

    def translations(self) -> dict[str, dict[str, str]]:
        """Return concept → language → form, from `concepts.json` in a local folder; empty for the hub."""
        return super().translations() if self.location.folder else {}


def open_hub(data: str, location: DataLocation, requested: Columns, captions: bool) -> HubSource:
    """Open `hf:NAME[:SPLIT]`. Without SPLIT it is `train`, or the only split.

    Raises `InputError` if the data set or split can't be loaded, or a column is missing.
    """
    name, _, split = data.removeprefix(PREFIX).partition(":")
    if not name:
        raise InputError(f"{data}: no name; write hf:NAME or hf:NAME:SPLIT")
    folder = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else ""
    name = folder or name
    check_files(name)
    dataset = load(name, split)
    kinds: dict[str, Kind] = kinds_of_schema(dataset.features.arrow_schema)
    # Classes are stored as numbers, and read as their names.
    kinds |= {column: "text" for column, feature in dataset.features.items() if hasattr(feature, "int2str")}
    columns = detect(kinds, requested, data, captions)
    location, split = replace(location, folder=folder), split or str(dataset.split)
    lists = kinds.get(str(columns.caption)) == "texts"
    return HubSource(data, location, columns, captions, name, split, caption_lists=lists)


@lru_cache(maxsize=CACHED_SETS)
def load(name: str, split: str) -> Any:
    """Return the `datasets.Dataset`; raises `InputError` if it can't be loaded or needs a split."""
    import datasets

    # `load_dataset` can't read what `save_to_disk` wrote.
    saved = (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file()
    try:
        if not saved:
            chosen = split or _default(name, datasets.get_dataset_split_names(name))
            return datasets.load_dataset(name, split=chosen)
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            return loaded[split or _default(name, list(loaded))]
        return loaded
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"hf:{name}: {reason}; check name, split and network") from error


def _default(name: str, splits: list[str]) -> str:
    if DEFAULT_SPLIT in splits or len(splits) == 1:
        return DEFAULT_SPLIT if DEFAULT_SPLIT in splits else splits[0]
    raise InputError(f"hf:{name}: which split? Write hf:{name}:SPLIT, one of {', '.join(splits)}")


def _table(dataset: Any, columns: Columns) -> Any:
    return dataset.select_columns(list(columns.used())).with_format("arrow")


def _with_names(record: Record, features: Any) -> Record:
    """Return the record with class numbers replaced by class names."""
    if isinstance(record, str):
        return record
    return {column: _class_name(value, features[column]) for column, value in record.items()}


def _class_name(value: Any, feature: Any) -> Any:
    if not hasattr(feature, "int2str"):
        return value
    # A negative class means that the label is unknown.
    return None if value is None or value < 0 else feature.int2str(value)
