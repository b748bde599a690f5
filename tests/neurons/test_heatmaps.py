"""A map is the neurons' own activations over the patches, and points where they are highest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mmray.errors import InputError
from mmray.models.capture import capture_activations
from mmray.models.patches import Patches, patches_of
from mmray.neurons.activation_cache import forward
from mmray.neurons.heatmaps import SIDE, MapRequest, mask, min_max, overlay, patch_maps, pointing, upsample
from tests.support.samples import CAPTIONS, batch_of, picture

# Subnormal numbers vanish when they are divided, sign and all.
GRID = st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=12, max_size=12)


def grid(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(3, 4)


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe", "blip2_opt"])
def test_maps_are_the_activations_of_the_image_tokens(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:2])
    patches = patches_of(model, batch, 1, picture(1).size)
    if patches is None:
        spans = [range(run.start, run.stop) for run in batch.spans if run.row == 1 and run.modality == "image"]
        positions = [position for span in spans for position in span]
        patches = Patches(1, len(positions), tuple(positions))
    neurons, signs = [(0, 1), (1, 2), (1, 3)], [1.0, -1.0, 1.0]
    seen = {}
    with (
        torch.inference_mode(),
        capture_activations(model.network, model.projections, lambda layer, a, _: seen.update({layer: a})),
    ):
        forward(model, batch)
    rows = torch.tensor(patches.positions) + batch.positions
    parts = [seen[layer][rows, unit].float() for layer, unit in neurons]
    expected = (parts[0] - parts[1] + parts[2]) / 3
    plain = (parts[0] + parts[1] + parts[2]) / 3
    found = patch_maps(model, batch, [MapRequest(1, patches, neurons, signs), MapRequest(1, patches, neurons)])
    torch.testing.assert_close(found[0].flatten(), expected)
    torch.testing.assert_close(found[1].flatten(), plain)


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl_moe", "blip2_opt"])
def test_gate_maps_are_what_the_released_code_reads(open_model, variant):
    """Its hooks keep the output of the MLP's activation function; a plain MLP's is the activation itself."""
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:2])
    spans = [range(run.start, run.stop) for run in batch.spans if run.row == 1 and run.modality == "image"]
    positions = [position for span in spans for position in span]
    patches = Patches(1, len(positions), tuple(positions))
    neurons = [(0, 1), (1, 2), (1, 3)]
    opened, activation = {}, {}
    with (
        torch.inference_mode(),
        capture_activations(
            model.network,
            model.projections,
            lambda layer, a, o: (activation.update({layer: a}), opened.update({layer: o})),
        ),
    ):
        forward(model, batch)
    rows = torch.tensor(positions) + batch.positions
    seen = activation if variant == "blip2_opt" else {layer: functional.silu(gate) for layer, gate in opened.items()}
    expected = sum(seen[layer][rows, unit].float() for layer, unit in neurons) / 3
    found = patch_maps(model, batch, [MapRequest(1, patches, neurons, None, "gate"), MapRequest(1, patches, neurons)])
    torch.testing.assert_close(found[0].flatten(), expected)
    assert torch.equal(*found) == (variant == "blip2_opt")


@given(GRID)
def test_scaled_maps_keep_their_order_and_bounds(values):
    found = grid(values)
    low, high = found.min(), found.max()
    larger = upsample(found, 30, 40)
    assert larger.min() >= low - 1e-5
    assert larger.max() <= high + 1e-5
    scaled = min_max(found)
    assert (scaled.min(), scaled.max()) == ((0, 1) if high > low else (0, 0))


def test_upsampling_a_map_to_its_own_size_leaves_it():
    found = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(upsample(found, 5, 7), found)


def test_the_mask_is_the_highest_twentieth():
    found = torch.randperm(10_000, generator=torch.Generator().manual_seed(0)).reshape(100, 100).float()
    chosen = mask(found)
    assert int(chosen.sum()) == 500
    assert found[chosen].min() > found[~chosen].max()


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (1, 1)])
def test_a_peak_points_at_the_box_round_it(place):
    found = torch.zeros(3, 4)
    found[place] = 1.0
    box = (place[1] / 4, place[0] / 3, 1 / 4, 1 / 3)
    held = pointing(found, box)
    assert held.hit
    assert held.area == pytest.approx(1 / 12, abs=0.01)
    elsewhere = pointing(found, ((place[1] + 2) % 4 / 4, (place[0] + 1) % 3 / 3, 1 / 4, 1 / 3))
    assert not elsewhere.hit
    assert held.iou > elsewhere.iou


def test_boxes_are_held_against_what_the_map_covers():
    found = torch.zeros(4, 4)
    found[0, 0] = 1.0
    # The map lies over the right half: its left upper corner is in the image's middle.
    assert pointing(found, (0.5, 0.0, 0.2, 0.2), (0.5, 0.0, 0.5, 1.0)).hit
    assert not pointing(found, (0.0, 0.0, 0.2, 0.2), (0.5, 0.0, 0.5, 1.0)).hit


def test_a_random_point_hits_as_often_as_the_box_is_large():
    generator = torch.Generator().manual_seed(0)
    box = (0.2, 0.1, 0.5, 0.6)
    held = [pointing(torch.rand(8, 8, generator=generator), box) for _ in range(400)]
    assert held[0].area == pytest.approx(0.3, abs=1 / SIDE)
    assert sum(one.hit for one in held) / len(held) == pytest.approx(held[0].area, abs=0.08)


def test_an_overlay_is_warm_where_the_map_is_high():
    image = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    colours = overlay(image, torch.tensor([[0.0, 1.0]])).int()
    assert colours[4, 7, 0] > colours[4, 0, 0]
    assert colours[4, 0, 2] > colours[4, 7, 2]


def test_a_models_heat_map_has_the_images_size(open_model):
    model = open_model("llava")
    image = picture(0, 40, 80)
    found = model.heat_map(image, ["L0.u1", "L1.u2"])
    assert found.shape == (40, 80)
    # The middle alone is seen: around it there is nothing but the lowest value.
    assert (found[:, :19] == found.min()).all()
    assert (found[:, 61:] == found.min()).all()
    turned = model.heat_map(image, ["L0.u1", "L1.u2"], signs=[-1, -1])
    torch.testing.assert_close(turned[:, 20:60], -found[:, 20:60])


@pytest.mark.parametrize("variant", ["blip2_opt", "mllama"])
def test_families_without_a_grid_have_no_heat_map(open_model, variant):
    with pytest.raises(InputError, match="no grid of tokens"):
        open_model(variant).heat_map(picture(0), ["L0.u1"])


def test_neurons_outside_the_model_have_no_heat_map(open_model):
    with pytest.raises(InputError, match=r"L9\.u1 is outside"):
        open_model("llava").heat_map(picture(0), ["L9.u1"])
