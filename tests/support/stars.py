"""An image folder of stars and roses, drawn here, that the demo's model captions right although it never saw them."""

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 96
SKIES = ("#cfe8ff", "#9fd39f", "#f3e3c2", "#e9d5f5")


def star_folder(folder: Path, count: int, seed: int = 0) -> Path:
    """Write `count` images with `metadata.jsonl`; every third is a rose."""
    folder.mkdir(parents=True)
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        word = "rose" if number % 3 == 2 else "star"
        _picture(word, drawn).save(folder / f"{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "text": f"A {word}."})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _picture(word: str, drawn: random.Random) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), drawn.choice(SKIES))
    pen, size = ImageDraw.Draw(image), drawn.randint(20, 30)
    x, y = drawn.randint(38, 58), drawn.randint(38, 54)
    if word == "star":
        lengths = [size if point % 2 == 0 else 0.45 * size for point in range(10)]
        turns = [point * math.pi / 5 for point in range(10)]
        points = [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(lengths, turns, strict=True)]
        pen.polygon(points, fill="#f6d021", outline="black")
    else:
        pen.ellipse((x - 0.7 * size, y - size, x + 0.7 * size, y + 0.5 * size), fill="#ee2233", outline="black")
        pen.line((x, y + 0.5 * size, x + 4, y + 1.4 * size), fill="black")
    return image
