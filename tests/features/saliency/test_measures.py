"""Measures of maps: perfect maps have perfect values, constant ones those of chance, curves their ends."""

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.detector.boxes import corners, from_centres, in_image
from mmray.features.saliency.insertion_deletion import erasure_curves, erasure_ends
from mmray.features.saliency.maps import Saliency
from mmray.features.saliency.max_box import LEVELS, boxes_found
from mmray.features.saliency.measures import (
    area_under,
    highest,
    mask_iou,
    objects_mask,
    patch_order,
    points_at,
)
from mmray.features.saliency.saliency_input import open_input, target_of
from mmray.features.saliency.summary import summarise_saliency
from mmray.features.saliency.tables import PARTS
from mmray.neurons.heatmaps import SIDE

WHOLE = (0.0, 0.0, 1.0, 1.0)
sides = st.floats(0.2, 0.5)
boxes = st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 0.5), sides, sides)


@given(boxes)
def test_a_box_s_own_map_is_perfect(box):
    values = torch.where(objects_mask([box], WHOLE), 1.0, 0.0)
    objects = objects_mask([box], WHOLE)
    assert points_at(values, objects)
    assert boxes_found(Saliency(values), [box], WHOLE).mean() > 0.9


@given(boxes, boxes)
def test_boxes_keep_their_place_in_every_form(box, covers):
    own = torch.tensor(box, dtype=torch.float64)
    left, top, right, bottom = corners(own).tolist()
    assert (left, top) == box[:2] and (right - left, bottom - top) == pytest.approx(box[2:])
    centre = torch.cat([own[:2] + own[2:] / 2, own[2:]])
    assert from_centres(centre).tolist() == pytest.approx(box)
    placed = in_image(own, covers).tolist()
    assert placed[:2] == pytest.approx([covers[axis] + box[axis] * covers[axis + 2] for axis in (0, 1)])
    assert placed[2:] == pytest.approx([box[axis] * covers[axis] for axis in (2, 3)])


def test_the_highest_point_of_a_plateau_is_its_middle():
    values = torch.zeros(SIDE, SIDE)
    values[20:41, 50:61] = 1.0
    assert highest(values) == (30, 55)
    values[70, 3] = 2.0
    assert highest(values) == (70, 3)


def test_the_mask_of_a_map_with_a_wide_plateau_is_the_plateau():
    objects = objects_mask([(0.25, 0.25, 0.5, 0.5)], WHOLE)
    assert mask_iou(objects.float(), objects) == 1.0
    rising = torch.arange(float(SIDE * SIDE)).reshape(SIDE, SIDE)
    assert mask_iou(rising, ~objects) == pytest.approx(0.05 / 0.75, rel=0.01)


def test_the_largest_part_alone_makes_the_box():
    values = torch.zeros(SIDE, SIDE)
    values[8:40, 8:40] = 1.0
    values[80:84, 80:84] = 1.0
    assert boxes_found(Saliency(values), [(8 / SIDE, 8 / SIDE, 32 / SIDE, 32 / SIDE)], WHOLE).all()
    assert not boxes_found(Saliency(values), [(80 / SIDE, 80 / SIDE, 4 / SIDE, 4 / SIDE)], WHOLE).any()


def test_boxes_are_those_of_the_image_where_the_map_covers_a_part():
    covers = (0.25, 0.0, 0.5, 1.0)
    mask = objects_mask([(0.25, 0.0, 0.25, 1.0)], covers)
    assert mask[:, : SIDE // 2].all() and not mask[:, SIDE // 2 :].any()
    assert boxes_found(Saliency(mask.float()), [(0.25, 0.0, 0.25, 1.0)], covers).all()


def test_patches_go_from_the_highest_to_the_lowest():
    values = torch.arange(16.0).reshape(4, 4)
    larger = values.repeat_interleave(SIDE // 4, 0).repeat_interleave(SIDE // 4, 1)
    assert patch_order(larger, 4, 4).tolist() == list(range(15, -1, -1))


def test_curves_begin_and_end_with_the_whole_and_nothing(joint, images, drawn_scenes):
    word = drawn_scenes[0].objects[0]
    batch, targets = target_of(joint.model, images[0], f"An image of a {word}.", word)
    given = open_input(joint.model, joint, batch, targets, images[:1])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ends = erasure_ends(given)
    deletion, insertion = erasure_curves(given, [order], ends)
    whole = given.probabilities(given.features, targets)
    nothing = given.probabilities(given.features.mean(dim=1, keepdim=True).expand_as(given.features), targets)
    assert torch.allclose(deletion[0, 0], whole[0]) and torch.allclose(insertion[0, -1], whole[0])
    assert torch.allclose(deletion[0, -1], nothing[0]) and torch.allclose(insertion[0, 0], nothing[0])
    _, reversed_ = erasure_curves(given, [order.flip(0)], ends)
    # What is left when the first patches of an order go is what the reversed order puts back first.
    assert torch.allclose(deletion[0], reversed_[0].flip(0), atol=1e-6)


def test_the_area_of_a_line_is_its_mean():
    assert area_under(torch.linspace(0, 1, 9)) == pytest.approx(0.5)
    assert area_under(torch.full((9,), 0.3)) == pytest.approx(0.3)


def rows(samples: int) -> list[dict[str, object]]:
    found = []
    for sample in range(samples):
        base = {"concept": "dog", "sample_id": str(sample), "method": "gradient"}
        found.append(base | {"measure": "pointing_game", "sums": [float(sample % 2), 1.0]})
        hits = [float(number == sample % 3) for number in range(LEVELS)]
        found.append(base | {"measure": "max_box_accuracy", "sums": [*hits, 1.0]})
    return found


def table(found: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(found, schema=PARTS["observations"])


def test_measures_are_means_and_one_threshold_serves_all_images():
    found = {row["measure"]: row for row in summarise_saliency(table(rows(12)), draws=200).to_pylist()}
    assert found["pointing_game"]["value"] == 0.5
    assert found["pointing_game"]["low"] < 0.5 < found["pointing_game"]["high"]
    assert found["max_box_accuracy"]["value"] == pytest.approx(4 / 12)


def test_however_the_rows_are_cut_the_table_is_the_same():
    found = rows(10)
    assert summarise_saliency(table(found), 50) == summarise_saliency(table(found[::-1]), 50)
