"""What is observed of a word's maps and its object's boxes: rows of numbers that add up over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmray.engine.clock import phase
from mmray.features.saliency.insertion_deletion import erasure_curves, erasure_ends
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.measures import (
    Boxes,
    area_under,
    boxes_found,
    mask_iou,
    objects_mask,
    patch_order,
    points_at,
)
from mmray.features.saliency.methods import Explained, method_of

CHANCE = "chance"
"""The method of a point drawn at random: the part of the map that the object takes."""


def draw_maps(looked: Explained, methods: Sequence[str]) -> dict[str, list[Saliency]]:
    """Return the maps of all places by each method."""
    maps = {}
    for name in methods:
        with phase(name):
            maps[name] = [method_of(name)(looked, number) for number in range(len(looked.words))]
    return maps


def observations(
    looked: Explained, maps: dict[str, list[Saliency]], boxes: Sequence[Boxes], *, erased: bool
) -> Iterator[dict[str, object]]:
    """Yield a row a measure, method and place: sums, the last of which is what the others are divided by.

    `boxes` are those of each place's object; `erased`: insertion and deletion too, 2 × (steps − 1) forwards a method
    and two for all.
    """
    places = looked.look.places
    for number, place in enumerate(places):
        covers = looked.look.grid(place.row).covers
        objects = objects_mask(boxes[number], covers)
        row = {"concept": place.concept, "sample_id": place.sample_id}
        yield row | {"measure": "pointing_game", "method": CHANCE, "sums": [float(objects.float().mean()), 1.0]}
        for method, found in maps.items():
            values = found[number].values.cpu()
            sums = {
                "pointing_game": [float(points_at(values, objects))],
                "iou": [mask_iou(values, objects)],
                "max_box_accuracy": boxes_found(values, boxes[number], covers).double().tolist(),
            }
            for measure, parts in sums.items():
                yield row | {"measure": measure, "method": method, "sums": [*parts, 1.0]}
    if not erased:
        return
    ends = erasure_ends(looked.look)
    for method, found in maps.items():
        grids = [looked.look.grid(place.row) for place in places]
        orders = [
            patch_order(saliency.values.cpu(), grid.rows, grid.columns)
            for saliency, grid in zip(found, grids, strict=True)
        ]
        for measure, curves in zip(("deletion", "insertion"), erasure_curves(looked.look, orders, ends), strict=True):
            for place, curve in zip(places, curves, strict=True):
                row = {"concept": place.concept, "sample_id": place.sample_id, "measure": measure, "method": method}
                yield row | {"sums": [area_under(curve), 1.0]}
