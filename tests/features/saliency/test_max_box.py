"""MaxBoxAcc against the released protocol written out pixel by pixel."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmray.features.saliency.maps import Saliency, paint
from mmray.features.saliency.max_box import LENGTH, LEVELS, boxes_found, levels_of, threshold_boxes

WHOLE = (0.0, 0.0, 1.0, 1.0)


def parts_of(mask):
    """Return the 8-connected parts of a mask as sets of points, by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            part.add((y, x))
            near = {(y + down, x + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left
            left -= near
            edge += near
        yield part


def polygon_area(part):
    """Return the area of the outer contour by the shoelace formula, the contour traced from pixel to pixel."""
    ring = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    start = min(part)
    path, here, came = [start], start, 6
    for _ in range(4 * len(part) + 8):
        for turn in range(1, 9):
            way = (came + turn) % 8
            point = here[0] + ring[way][0], here[1] + ring[way][1]
            if point in part:
                break
        else:
            return 0.0
        # The neighbour that was looked at last lies outside: the search goes on from there.
        came, here = (way + 4) % 8, point
        path.append(here)
        if len(path) > 3 and path[-2:] == path[:2]:
            break
    path.pop()  # the first step, taken again
    return abs(sum(y * u - v * x for (y, x), (v, u) in pairwise(path))) / 2


def released(levels, true):
    """Return which of the released thresholds find the box, by the released conventions."""
    height, width = levels.shape
    hits = set()
    for threshold in sorted({int(step * 0.001 * levels.max()) for step in range(1000)}):
        mask = levels > threshold
        parts = sorted(parts_of(mask), key=polygon_area)
        ys, xs = zip(*parts[-1], strict=True) if parts else ((0,), (0,))
        box = (min(xs), min(ys), min(max(xs) + 1, width - 1), min(max(ys) + 1, height - 1)) if parts else (0,) * 4
        sides = [min(box[axis + 2], true[axis + 2]) - max(box[axis], true[axis]) + 1 for axis in (0, 1)]
        shared = max(sides[0], 0) * max(sides[1], 0)
        areas = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (box, true)]
        if shared / (sum(areas) - shared) >= 0.5:
            hits.add(threshold)
    return hits


@pytest.mark.parametrize("seed", range(8))
def test_hits_are_those_of_the_released_protocol(seed, monkeypatch):
    monkeypatch.setattr("mmray.features.saliency.max_box.LENGTH", 20)
    noise = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
    # Coarse, so that thresholds repeat and the loop above stays short.
    coarse = (noise * 6).round() / 6
    values = torch.nn.functional.interpolate(coarse[None, None], (20, 20), mode="bilinear")[0, 0]
    levels = levels_of(Saliency(values))
    box = (0.1, 0.2, 0.55, 0.6)
    true = tuple(int(20 * side) for side in (0.1, 0.2, 0.65, 0.8))
    found = boxes_found(Saliency(values), [box], WHOLE)
    assert {number for number in range(LEVELS) if found[number]} == released(levels, true)


def test_maps_of_boxes_keep_sharp_edges_at_the_protocol_s_size():
    boxes, weights = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.3, 0.25]]), torch.tensor([0.2, 0.9])
    levels = levels_of(Saliency(paint(boxes, weights), weights, boxes))
    assert levels.shape == (LENGTH, LENGTH) and set(np.unique(levels)) == {0, 255}
    assert (threshold_boxes(levels) == [56, 112, 56 + 67, 112 + 56]).all()


def test_a_flat_map_finds_nothing():
    assert not boxes_found(Saliency(torch.full((96, 96), 0.3)), [(0.0, 0.0, 1.0, 1.0)], WHOLE).any()
