"""The same few samples written in every form of data that mmray reads."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.data.samples import Failure, Sample
from mmray.data.sources import open_source

Row = dict[str, Any]
SIDE = 64
"""Width and height of a demo image in pixels, as the COCO files say it."""


def table(rows: list[Row]) -> pa.Table:
    """Rows with the types that they have in the demo data."""
    return pa.Table.from_pylist(rows)


def write_parquet(folder: Path, rows: list[Row], name: str = "data.parquet", group: int = 4, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows), folder / name, row_group_size=group, **options)
    return folder / name


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(rows: list[Row], first: int = 0) -> list[tuple[str, bytes]]:
    """The members of a WebDataset tar: image, text, and the rest as JSON."""
    listed = []
    for number, row in enumerate(rows, first):
        rest = {name: value for name, value in row.items() if name not in ("image", "caption")}
        listed += [
            (f"{number:04}.jpg", row["image"]["bytes"]),
            (f"{number:04}.json", json.dumps(rest).encode()),
            (f"{number:04}.txt", row["caption"].encode()),
        ]
    return listed


def write_images(folder: Path, rows: list[Row]) -> list[str]:
    """Write the rows' images; return their names below `folder`."""
    names = [f"images/{number:04}.jpg" for number in range(len(rows))]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, row in zip(names, rows, strict=True):
        (folder / name).write_bytes(row["image"]["bytes"])
    return names


def write_jsonl(folder: Path, rows: list[Row]) -> Path:
    lines = [
        json.dumps({"file_name": name, **{key: value for key, value in row.items() if key != "image"}})
        for name, row in zip(write_images(folder, rows), rows, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "metadata.jsonl"


def write_csv(folder: Path, rows: list[Row]) -> Path:
    names = write_images(folder, rows)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        keys = [key for key in rows[0] if key != "image"]
        writer.writerow(["file_name", *keys])
        for name, row in zip(names, rows, strict=True):
            cells = [json.dumps(row[key]) if isinstance(row[key], list) else row[key] for key in keys]
            writer.writerow([name, *cells])
    return folder / "metadata.csv"


def write_coco(folder: Path, rows: list[Row], split: str = "val2017") -> Path:
    """Write captions, instances and images as COCO lays them out; the captions file's folder is `annotations`."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, captions, instances = [], [], []
    names = sorted({name for row in rows for name in row["objects"]})
    for number, row in enumerate(rows, 1):
        (folder / split / f"{number:012}.jpg").write_bytes(row["image"]["bytes"])
        images.append({"id": number, "file_name": f"{number:012}.jpg", "width": SIDE, "height": SIDE})
        captions.append({"id": 100 + number, "image_id": number, "caption": row["caption"]})
        instances += [
            {
                "image_id": number,
                "category_id": names.index(name) + 1,
                "bbox": [side * SIDE for side in box],
                "segmentation": [[1.0, 2.0]],
            }
            for name, box in zip(row["objects"], row["boxes"], strict=True)
        ]
    # COCO's captions are in no order; the source puts those of an image together, images in their order.
    content = {"images": images, "annotations": captions[::-1]}
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    content = {"images": images, "annotations": instances, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder / "annotations" / f"captions_{split}.json"


def write_tars(folder: Path, rows: list[Row]) -> Path:
    """Write two tars, the first with one sample more than the second."""
    half = (len(rows) + 1) // 2
    write_tar(folder / "part-000.tar", members(rows[:half]))
    write_tar(folder / "part-001.tar", members(rows[half:], half))
    return folder


def write_parts(folder: Path, rows: list[Row]) -> Path:
    """Write two Parquet files in a folder of folders."""
    write_parquet(folder / "language=a", rows[:3])
    write_parquet(folder / "language=b", rows[3:])
    return folder


FORMS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "parquet file": write_parquet,
    "parquet folder": write_parts,
    "tars": write_tars,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "coco": write_coco,
}


def read_all(data: str, **options: Any) -> list[Sample | Failure]:
    """Every row of the data, in order."""
    source = open_source(data, **options)
    return [row for file in source.files() for row in source.read(file.path, 0, file.rows)]


def failures(rows: list[Sample | Failure]) -> dict[int, str]:
    """Place among the rows → message, of those that failed."""
    return {number: row.message for number, row in enumerate(rows) if isinstance(row, Failure)}
