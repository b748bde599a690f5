"""`hf:NAME[:SPLIT]`: a data set of the Hugging Face hub, or of a local folder, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from mmray.data.arrow import kinds_of_schema, records_of
from mmray.data.columns import Columns, Kind, detect
from mmray.data.hub_files import check_files
from mmray.data.images import LARGEST_FILE
from mmray.data.places import DataLocation, leaves
from mmray.data.rows import Record
from mmray.data.source import DataFile, FileSource
from mmray.errors import InputError
from mmray.storage import read_file

ROWS_AT_ONCE = 32
NAMES_AT_ONCE = 65536
DEFAULT_SPLIT = "train"
CACHED_SETS = 4


@dataclass(frozen=True)
class HubSource(FileSource):
    """One split; as a file its path is the split's name, its digest the fingerprint that `datasets` gives it."""

    kind: ClassVar[str] = "hub"

    name: str
    split: str

    def files(self) -> list[DataFile]:
        """Return the split as one file; its size is that of the Arrow data."""
        dataset = load(self.name, self.split)
        rows = self.samples_in(self.split, dataset.num_rows)
        return [DataFile(self.split, rows, dataset.data.nbytes, dataset._fingerprint)]

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of the split, images not decoded."""
        dataset = load(self.name, path)
        for first in range(start, min(stop, dataset.num_rows), ROWS_AT_ONCE):
            batch = _table(dataset, self.columns)[first : min(stop, first + ROWS_AT_ONCE)]
            rows = (_with_names(record, dataset.features) for record in records_of(batch))
            yield from ((f"{path}#{row}", record) for row, record in enumerate(rows, first))

    def fetch(self, path: str, names: list[str]) -> list[bytes | str]:
        """Return images that `datasets` left as files: in the local folder or in its own cache, nowhere else."""
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        named = [datasets.config.HF_CACHE_HOME, HF_HUB_CACHE, *([self.place.folder] if self.place.folder else [])]
        homes = [Path(home).resolve() for home in named]

        def one(name: str) -> bytes | str:
            file = (Path(self.place.folder) / name).absolute()
            if ".." in file.parts or leaves(file, homes):
                return f"image name {name!r} leaves the data's folder"
            try:
                return read_file(file, LARGEST_FILE) or f"image {name!r} is empty"
            except (OSError, ValueError) as error:
                return f"no image {name!r} ({error})"

        return [one(name) for name in names]

    def object_cells(self) -> Iterable[Any]:
        """Yield the cells of the objects column, no other column read."""
        dataset = load(self.name, self.split)
        table = _table(dataset, Columns(objects=self.columns.objects))
        for first in range(0, dataset.num_rows, NAMES_AT_ONCE):
            yield from table[first : first + NAMES_AT_ONCE].column(0).to_pylist()

    def translations(self) -> dict[str, dict[str, str]]:
        """Return concept → language → form, from a `concepts.json` in a local folder; else empty."""
        return super().translations() if self.place.folder else {}


def open_hub(data: str, asked: Columns, captions: bool) -> HubSource:
    """Return the source of `hf:NAME[:SPLIT]`, the split `train` or the only one if none is named.

    Raises `InputError` if the data set or split can't be had, or a column is missing.
    """
    name, _, split = data.removeprefix("hf:").partition(":")
    if not name:
        raise InputError(f"{data}: no name; write hf:NAME or hf:NAME:SPLIT")
    folder = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else ""
    name = folder or name
    check_files(name)
    dataset = load(name, split)
    kinds: dict[str, Kind] = kinds_of_schema(dataset.features.arrow_schema)
    kinds |= {column: "text" for column, feature in dataset.features.items() if hasattr(feature, "int2str")}
    columns = detect(kinds, asked, data, captions)
    listed = kinds.get(str(columns.caption)) == "texts"
    return HubSource(
        data, DataLocation(folder, ()), columns, captions, name, split or str(dataset.split), listed=listed
    )


@lru_cache(maxsize=CACHED_SETS)
def load(name: str, split: str) -> Any:
    """Return the `datasets.Dataset`; raises `InputError` if it can't be had, or the split must be named."""
    import datasets

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
    """Return the record with the names of classes in place of their numbers."""
    if isinstance(record, str):
        return record
    return {column: _class_name(value, features[column]) for column, value in record.items()}


def _class_name(value: Any, feature: Any) -> Any:
    if not hasattr(feature, "int2str"):
        return value
    # A negative class means that the label is not known.
    return None if value is None or value < 0 else feature.int2str(value)
