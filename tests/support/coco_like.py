"""Demo scenes as COCO and Flickr hold images: five captions per image, objects in another file, a held-out split.

`coco_like(folder)` writes everything; the functions below it write one thing each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.captions import LANGUAGES, with_article
from jobs.demo.scenes import SIZE
from mmray.demo import DATA, EVALUATION
from tests.support.data_files import Row

CAPTIONS = 5
"""Captions per image."""
CONCEPTS = ("hammer", "pizza", "ship", "sun")
"""Every scene shows one of these, so that a few dozen scenes give concepts with enough images."""
TRAIN, HELD_OUT = "train2017", "val2017"
COLUMNS = ["image", "language", "domain", "objects", "boxes", "background"]


@dataclass(frozen=True)
class CocoLike:
    """Paths of the same scenes in several forms; `train` and `held_out` share no image.

    `train`, `held_out`: COCO captions files, `instances` and images next to them. `single`: the COCO file of `train`
    with the first caption of each image only. `exploded`: `train` as Parquet, one row per caption, with the columns of
    the COCO source and `domain`; `exploded_held_out` likewise.
    """

    train: Path
    held_out: Path
    single: Path
    exploded: Path
    exploded_held_out: Path
    images: int
    """Images of `train`."""


def coco_like(folder: Path, images: int = 40, held_out: int = 12) -> CocoLike:
    """Write COCO-like data below a folder; the same arguments always give the same bytes."""
    rows = scenes(images + held_out)
    train, later = rows[:images], rows[images:]
    return CocoLike(
        train=write_coco(folder / "coco", train, TRAIN),
        held_out=write_coco(folder / "coco", later, HELD_OUT, first=images),
        single=write_coco(folder / "single", train, TRAIN, captions=1),
        exploded=write_exploded(folder / "exploded" / "train.parquet", train),
        exploded_held_out=write_exploded(folder / "exploded_held_out" / "val.parquet", later, first=images),
        images=images,
    )


def scenes(count: int) -> list[Row]:
    """Return demo scenes that show at least one of `CONCEPTS`, in the order of the demo's files."""
    return [dict(row) for row in _scenes()[:count]]


@cache
def _scenes() -> list[Row]:
    rows = (row for path in (DATA, EVALUATION) for row in pq.read_table(path, columns=COLUMNS).to_pylist())
    return [row for row in rows if set(CONCEPTS) & set(row["objects"])]


def captions_of(row: Row) -> list[str]:
    """Return what five people write about a scene: all wordings differ; the last names one object only."""
    names = [with_article(name) for name in row["objects"]]
    words = LANGUAGES["en"]
    background = words.on_background.format(colour=row["background"])
    return [
        words.caption.format(objects=_listed(names), background=""),
        words.caption.format(objects=_listed(names[::-1]), background=background),
        f"A picture of {_listed(names)}.",
        f"There is {_listed(names[::-1])} in the image.",
        f"A drawing with {names[0]}.",
    ]


def _listed(names: Sequence[str]) -> str:
    first = ", ".join(names[:-1])
    return first + " and " + names[-1] if first else names[-1]


def image_id(number: int) -> int:
    """Return the COCO id of the scene of this number; as in COCO, ids have gaps."""
    return 139 + 37 * number


def annotation_id(number: int, caption: int) -> int:
    """Return the COCO id of a caption; as in COCO, it has nothing to do with that of the image."""
    return 700_000 - 11 * number - 3_001 * caption


def write_coco(folder: Path, rows: Sequence[Row], split: str, *, captions: int = CAPTIONS, first: int = 0) -> Path:
    """Write scenes as COCO lays them out; return the captions file. `first` is the number of the first scene."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    names = sorted({name for row in scenes(len(_scenes())) for name in row["objects"]})
    images, said, instances = [], [], []
    for number, row in enumerate(rows, first):
        name = f"{image_id(number):012}.jpg"
        (folder / split / name).write_bytes(row["image"]["bytes"])
        images.append({"id": image_id(number), "file_name": name, "width": SIZE, "height": SIZE, "license": 1})
        said += [
            {"id": annotation_id(number, place), "image_id": image_id(number), "caption": caption}
            for place, caption in enumerate(captions_of(row)[:captions])
        ]
        instances += [
            {
                "id": 10 * number + place,
                "image_id": image_id(number),
                "category_id": names.index(name) + 1,
                "bbox": [side * SIZE for side in box],
                "segmentation": [[1.0, 2.0]],
                "iscrowd": 0,
            }
            for place, (name, box) in enumerate(zip(row["objects"], row["boxes"], strict=True))
        ]
    # COCO's captions are in no order.
    Random(0).shuffle(said)
    categories = [{"id": number, "name": name, "supercategory": "thing"} for number, name in enumerate(names, 1)]
    annotations = folder / "annotations"
    for kind, content in (
        ("captions", {"images": images, "annotations": said}),
        ("instances", {"images": images, "annotations": instances, "categories": categories}),
    ):
        (annotations / f"{kind}_{split}.json").write_text(json.dumps(content))
    return annotations / f"captions_{split}.json"


def write_exploded(path: Path, rows: Sequence[Row], *, captions: int = CAPTIONS, first: int = 0) -> Path:
    """Write scenes as Parquet with one row per caption: the image's bytes are repeated, its id is not unique.

    `sample_id` is that of the COCO source; `image_id` is the image's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    exploded = [
        {
            "sample_id": f"{image_id(number)}-{annotation_id(number, place)}",
            "image_id": str(image_id(number)),
            "image": row["image"],
            "caption": caption,
            "domain": row["domain"],
            "objects": row["objects"],
            "boxes": row["boxes"],
        }
        for number, row in enumerate(rows, first)
        for place, caption in enumerate(captions_of(row)[:captions])
    ]
    pq.write_table(pa.Table.from_pylist(exploded), path)
    return path
