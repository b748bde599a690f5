"""Maps of a word drawn over its image: as a picture, and as one page of HTML with their numbers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmray.detector.boxes import in_image
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.measures import highest
from mmray.features.saliency.model import Explanation
from mmray.neurons.heatmaps import overlay, placed

SHOWN = 384
"""Minimum pixels of a picture's longer side."""
BOXES = 3
"""Boxes drawn and listed: those of the highest weights."""


def over(image: Image.Image, saliency: Saliency, covers: Sequence[float]) -> Image.Image:
    """Return the image under the map's colours, with the best boxes of methods that weigh boxes."""
    larger = _larger(image)
    # Small images are enlarged first, so that boxes and their labels are legible.
    values = placed(saliency.values.cpu(), (covers[0], covers[1], covers[2], covers[3]), larger.height, larger.width)
    pixels = torch.from_numpy(np.array(larger.convert("RGB")))
    picture = Image.fromarray(overlay(pixels, values).numpy())
    draw = ImageDraw.Draw(picture)
    for weight, (x, y, width, height) in best_boxes(saliency, covers):
        left, top = x * larger.width, y * larger.height
        ends = (left, top, left + width * larger.width, top + height * larger.height)
        draw.rectangle(ends, outline="white", width=2)
        # A box may begin outside the image, where its label could not be read.
        draw.text((max(left, 0) + 4, max(top, 0) + 4), f"{weight:.3f}", fill="white")
    return picture


def best_boxes(saliency: Saliency, covers: Sequence[float]) -> list[tuple[float, tuple[float, ...]]]:
    """Return the boxes of the highest weights as fractions of the image, each after its weight."""
    if saliency.weights is None or saliency.boxes is None:
        return []
    found = saliency.weights.topk(min(BOXES, len(saliency.weights)))
    boxes = in_image(saliency.boxes[found.indices].cpu(), covers)
    return [(float(weight), tuple(box.tolist())) for weight, box in zip(found.values, boxes, strict=True)]


def numbers(explanation: Explanation) -> list[dict[str, Any]]:
    """Return each map's range, highest point and best boxes; positions are fractions of the image."""
    rows = []
    for method, saliency in explanation.maps.items():
        down, across = highest(saliency.values.cpu())
        side = saliency.values.shape[0]
        x, y, width, height = explanation.covers
        rows.append(
            {
                "method": method,
                "lowest": float(saliency.values.min()),
                "highest": float(saliency.values.max()),
                "x": x + (across + 0.5) / side * width,
                "y": y + (down + 0.5) / side * height,
                "boxes": [{"weight": weight, "box": box} for weight, box in best_boxes(saliency, explanation.covers)],
            }
        )
    return rows


def page(image: Image.Image, word: str, explanation: Explanation) -> str:
    """Return one self-contained page: the image, and each method's map with its numbers."""
    figures = [_figure(_larger(image), "the image", "")]
    for row in numbers(explanation):
        note = f"{row['lowest']:.4f} to {row['highest']:.4f}; highest at {row['x']:.2f}, {row['y']:.2f}"
        picture = over(image, explanation.maps[row["method"]], explanation.covers)
        figures.append(_figure(picture, row["method"], note))
    lead = f"“{explanation.caption}” · P({word}) = {explanation.probability:.3f}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(word)} · saliency</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem;background:#fff;color:#1b1b1b}"
        "main{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:16rem}img{width:100%}"
        "figcaption small{color:#555;display:block}</style>"
        f"<h1>Where “{html.escape(word)}” comes from</h1><p>{html.escape(lead)}</p>"
        f"<main>{''.join(figures)}</main></html>"
    )


def _figure(picture: Image.Image, title: str, note: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{source}">'
        f"<figcaption><b>{html.escape(title)}</b><small>{html.escape(note)}</small></figcaption></figure>"
    )


def _larger(image: Image.Image) -> Image.Image:
    scale = max(1.0, SHOWN / max(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)))
