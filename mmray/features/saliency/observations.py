"""What is observed of the maps of words: rows of sums that add up over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmray.engine.clock import phase
from mmray.features.saliency.insertion_deletion import erasure_curves, erasure_ends
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.max_box import boxes_found
from mmray.features.saliency.measures import (
    Boxes,
    area_under,
    mask_iou,
    objects_mask,
    patch_order,
    points_at,
)
from mmray.features.saliency.methods import Explained, method_of

CHANCE = "chance"
"""The method of a random point: it hits with the share of the map that the object covers."""


def draw_maps(explained: Explained, methods: Sequence[str]) -> dict[str, list[Saliency]]:
    """Return the maps of all targets by each method."""
    maps = {}
    for name in methods:
        with phase(name):
            maps[name] = [method_of(name)(explained, index) for index in range(len(explained.words))]
    return maps


def observations(
    explained: Explained, maps: dict[str, list[Saliency]], boxes: Sequence[Boxes], *, erased: bool
) -> Iterator[dict[str, object]]:
    """Yield a row per measure, method and target; the last of its sums is the denominator of the others.

    `boxes` are those of each target's object. `erased` adds insertion and deletion, which take 2 × (steps − 1) forward
    passes per method and two for all.
    """
    given = explained.input
    targets, grids = given.targets, [given.grid(target.row) for target in given.targets]
    for index, target in enumerate(targets):
        covers = grids[index].covers
        objects = objects_mask(boxes[index], covers)
        row = {"concept": target.concept, "sample_id": target.sample_id}
        # Per target, so that chance is over the same words and images as the methods.
        yield row | {"measure": "pointing_game", "method": CHANCE, "sums": [float(objects.float().mean()), 1.0]}
        for method, found in maps.items():
            values = found[index].values.cpu()
            sums = {
                "pointing_game": [float(points_at(values, objects))],
                "iou": [mask_iou(values, objects)],
                "max_box_accuracy": boxes_found(found[index], boxes[index], covers).astype(float).tolist(),
            }
            for measure, parts in sums.items():
                yield row | {"measure": measure, "method": method, "sums": [*parts, 1.0]}
    if not erased:
        return
    ends = erasure_ends(given)
    for method, found in maps.items():
        orders = [
            patch_order(saliency.values.cpu(), grid.rows, grid.columns)
            for saliency, grid in zip(found, grids, strict=True)
        ]
        for measure, curves in zip(("deletion", "insertion"), erasure_curves(given, orders, ends), strict=True):
            for target, curve in zip(targets, curves, strict=True):
                row = {"concept": target.concept, "sample_id": target.sample_id, "measure": measure, "method": method}
                yield row | {"sums": [area_under(curve), 1.0]}
