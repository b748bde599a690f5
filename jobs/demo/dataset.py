"""Write scenes as the demo's Parquet files: image, clean caption, objects, boxes and questions."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jobs.demo.captions import TRANSLATIONS, Exchange, caption, question
from jobs.demo.scenes import Scene, World

SCHEMA: pyarrow.Schema = pyarrow.schema(
    {
        "sample_id": pyarrow.string(),
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        "caption": pyarrow.string(),
        "language": pyarrow.string(),
        "domain": pyarrow.string(),
        "objects": pyarrow.list_(pyarrow.string()),
        "boxes": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
        "background": pyarrow.string(),
        "questions": pyarrow.list_(pyarrow.struct({"question": pyarrow.string(), "answer": pyarrow.string()})),
    }
)
"""A row is a scene. `sample_id`: 16 hexadecimal digits of the SHA-256 of the JPEG bytes. `objects`: English names.
`boxes`: left, top, width, height, as fractions of the image's side, one box per object. `image.path`: always null."""

_SCENES_PER_CHUNK = 256
_JPEG_QUALITY = 92


def write_parquet(path: Path, world: World, scenes: Sequence[Scene], *, seed: int, english_share: float = 0.6) -> None:
    """Render scenes and write them with clean captions; the languages other than English get equal shares.

    Languages, captions and questions depend on `seed`: a file is a function of the arguments.
    """
    # A stream of its own: sharing that of `World.sample` would correlate languages with scenes.
    random = Random(f"texts {seed}")
    with pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(scenes), _SCENES_PER_CHUNK):
            chunk = scenes[start : start + _SCENES_PER_CHUNK]
            rows = [
                _row(scene, image, random, english_share)
                for scene, image in zip(chunk, world.render(chunk).cpu(), strict=True)
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))


def _row(scene: Scene, image: UInt8[Tensor, "3 size size"], random: Random, english_share: float) -> dict[str, object]:
    """Return a scene as a row of `SCHEMA`."""
    image_bytes = _jpeg(image)
    language = "en" if random.random() < english_share else random.choice(TRANSLATIONS)
    return {
        "sample_id": hashlib.sha256(image_bytes).hexdigest()[:16],
        "image": {"bytes": image_bytes, "path": None},
        "caption": caption(scene, language, random),
        "language": language,
        "domain": scene.domain,
        "objects": scene.objects,
        "boxes": scene.boxes,
        "background": scene.background,
        "questions": [exchange._asdict() for exchange in _different_questions(scene, random)],
    }


def _different_questions(scene: Scene, random: Random) -> list[Exchange]:
    """Return two distinct questions about a scene with one object, three about one with more."""
    count = 2 if len(scene.objects) == 1 else 3  # a scene with one object has fewer distinct questions
    questions: dict[str, Exchange] = {}
    while len(questions) < count:
        exchange = question(scene, random)
        questions[exchange.question] = exchange
    return list(questions.values())


def _jpeg(image: UInt8[Tensor, "3 size size"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
