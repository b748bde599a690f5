"""A word's maps over its image as a picture, and as one page of HTML with the numbers next to it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.measures import highest
from mmray.features.saliency.model import Explanation
from mmray.neurons.heatmaps import overlay, placed

SHOWN = 384
"""Pixels of a picture's longer side, at least."""
BOXES = 3
"""Boxes that are drawn and told: those of the highest weights."""


def over(image: Image.Image, saliency: Saliency, covers: Sequence[float]) -> Image.Image:
    """Return the image under the map's colours, with the boxes of the highest weights where the method weighs boxes."""
    larger = _larger(image)
    values = placed(saliency.values.cpu(), (covers[0], covers[1], covers[2], covers[3]), larger.height, larger.width)
    pixels = torch.from_numpy(np.array(larger.convert("RGB")))
    picture = Image.fromarray(overlay(pixels, values).numpy())
    draw = ImageDraw.Draw(picture)
    for weight, (x, y, width, height) in best_boxes(saliency, covers):
        left, top = x * larger.width, y * larger.height
        ends = (left, top, left + width * larger.width, top + height * larger.height)
        draw.rectangle(ends, outline="white", width=2)
        draw.text((max(left, 0) + 4, max(top, 0) + 4), f"{weight:.3f}", fill="white")
    return picture


def best_boxes(saliency: Saliency, covers: Sequence[float]) -> list[tuple[float, tuple[float, ...]]]:
    """Return the boxes of the highest weights, in parts of the image, each with its weight."""
    if saliency.weights is None or saliency.boxes is None:
        return []
    found = saliency.weights.topk(min(BOXES, len(saliency.weights)))
    shift = torch.tensor([covers[0], covers[1], 0.0, 0.0])
    scale = torch.tensor([covers[2], covers[3], covers[2], covers[3]])
    boxes = saliency.boxes[found.indices].cpu() * scale + shift
    return [(float(weight), tuple(box.tolist())) for weight, box in zip(found.values, boxes, strict=True)]


def numbers(answer: Explanation) -> list[dict[str, Any]]:
    """Return what each map says in numbers: its range, its highest point and its best boxes, in parts of the image."""
    rows = []
    for method, saliency in answer.maps.items():
        down, across = highest(saliency.values.cpu())
        side = saliency.values.shape[0]
        x, y, width, height = answer.covers
        rows.append(
            {
                "method": method,
                "lowest": float(saliency.values.min()),
                "highest": float(saliency.values.max()),
                "x": x + (across + 0.5) / side * width,
                "y": y + (down + 0.5) / side * height,
                "boxes": [{"weight": weight, "box": box} for weight, box in best_boxes(saliency, answer.covers)],
            }
        )
    return rows


def page(image: Image.Image, word: str, answer: Explanation) -> str:
    """Return one self-contained page: the image, and under each method's name its map with its numbers."""
    figures = [_figure(_larger(image), "the image", "")]
    for row in numbers(answer):
        told = f"{row['lowest']:.4f} to {row['highest']:.4f}; highest at {row['x']:.2f}, {row['y']:.2f}"
        figures.append(_figure(over(image, answer.maps[row["method"]], answer.covers), row["method"], told))
    said = f"“{answer.caption}” · P({word}) = {answer.probability:.3f}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(word)} · saliency</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem;background:#fff;color:#1b1b1b}"
        "main{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:16rem}img{width:100%}"
        "figcaption small{color:#555;display:block}</style>"
        f"<h1>Where “{html.escape(word)}” comes from</h1><p>{html.escape(said)}</p>"
        f"<main>{''.join(figures)}</main></html>"
    )


def _figure(picture: Image.Image, title: str, told: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{source}">'
        f"<figcaption><b>{html.escape(title)}</b><small>{html.escape(told)}</small></figcaption></figure>"
    )


def _larger(image: Image.Image) -> Image.Image:
    scale = max(1.0, SHOWN / max(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)))
