"""Every patch is an image token, each once, in the place that the processor cut it from."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from mmray.models.families import HABITS
from mmray.models.layout import PROBED
from mmray.models.patches import WHOLE, Patches, patches_of, tile_side
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import CAPTIONS, batch_of, picture

QUERIES = ("blip2_opt", "instructblip_vicuna")
"""Families whose image tokens are a Q-Former's, and no places of the image."""
WITHOUT = ("blip2_t5", "instructblip_t5", "mllama")
GRIDS = [variant for variant in VARIANTS if variant not in (*QUERIES, *WITHOUT)]


@pytest.mark.parametrize("variant", GRIDS)
def test_patches_are_image_tokens_each_once(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:2])
    for row in range(2):
        found = patches_of(model, batch, row, picture(row).size)
        assert found is not None
        assert len(set(found.positions)) == len(found.positions) == found.rows * found.columns
        ids = batch.inputs["input_ids"][row, list(found.positions)]
        assert ids.eq(model.parts.image_token_id).all()
        # Pictures are landscapes: grids are squares, or nearly as wide as the picture is.
        assert found.columns >= found.rows


@pytest.mark.parametrize("variant", [*QUERIES, *WITHOUT])
def test_images_that_are_no_grid_have_no_patches(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:1])
    assert patches_of(model, batch, 0, (56, 40)) is None


@pytest.mark.parametrize("variant", GRIDS)
def test_the_grid_of_a_model_outside_the_table_must_be_shown(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:1])
    # A network of its own: what was shown is remembered by the network.
    probed = replace(model, network=copy(model.network), parts=replace(model.parts, family=PROBED))
    assert patches_of(probed, batch, 0, picture(0).size) == patches_of(model, batch, 0, picture(0).size)


def test_a_wrong_grid_is_not_used(open_model, monkeypatch):
    model = open_model("llava_next")
    batch, _ = batch_of(model, CAPTIONS[:1])
    probed = replace(model, network=copy(model.network), parts=replace(model.parts, family=PROBED))
    # As if its newlines were patches.
    monkeypatch.delitem(HABITS, "llava_next")
    assert patches_of(model, batch, 0, picture(0).size) is not None
    assert patches_of(probed, batch, 0, picture(0).size) is None


def test_what_a_crop_leaves_out_is_not_covered(open_model):
    model = open_model("llava")
    batch, _ = batch_of(model, CAPTIONS[:1])
    assert model.processor.image_processor.do_center_crop
    assert patches_of(model, batch, 0, (200, 100)).covers == (0.25, 0.0, 0.5, 1.0)
    assert patches_of(model, batch, 0, (100, 200)).covers == (0.0, 0.25, 1.0, 0.5)
    assert patches_of(model, batch, 0, (100, 100)).covers == WHOLE


@pytest.mark.parametrize("variant", ["llava", "llava_next", "idefics3", "paligemma", "gemma3"])
def test_a_bright_corner_shows_in_its_patch(open_model, variant):
    """What changes most in the first block's input, when a corner of the image does, is that corner's patch."""
    from PIL import Image

    from mmray.models.blocks import BlockRecorder
    from mmray.models.prompting import encode, prompt_text, tokenize_caption
    from mmray.neurons.activation_cache import forward

    model = open_model(variant)
    side = 64

    def entering(corner: tuple[int, int] | None) -> tuple[torch.Tensor, Patches]:
        image = Image.new("RGB", (side, side), (90, 90, 90))
        if corner is not None:
            image.paste((255, 30, 30), (corner[0], corner[1], corner[0] + side // 4, corner[1] + side // 4))
        prompt = prompt_text(model, None, "en")
        tokens, offsets = tokenize_caption(model, prompt, "a dog")
        batch = encode(model, [prompt], [image], [tokens], [offsets])
        recorder = BlockRecorder(model)
        with torch.inference_mode(), recorder.recording():
            forward(model, batch)
        patches = patches_of(model, batch, 0, image.size)
        assert patches is not None
        return recorder.inputs[0][0][0][0, list(patches.positions)].float(), patches

    plain, patches = entering(None)
    last = side - side // 4
    corners = {(0, 0): (0, 0), (last, 0): (0, -1), (0, last): (-1, 0), (last, last): (-1, -1)}
    for corner, place in corners.items():
        moved = (entering(corner)[0] - plain).norm(dim=1).reshape(patches.rows, patches.columns)
        rows, columns = torch.meshgrid(torch.arange(patches.rows), torch.arange(patches.columns), indexing="ij")
        quarter = ((rows >= patches.rows / 2) == (place[0] < 0)) & ((columns >= patches.columns / 2) == (place[1] < 0))
        # The tower's attention spreads the change a little over all patches: most of it lies in the corner's quarter.
        assert moved[quarter].mean() > moved[~quarter].mean(), corner


def test_tiles_and_newlines_that_come_to_a_square_are_no_square(open_model):
    model = open_model("llava_onevision")
    vision = model.network.config.vision_config
    square = (vision.image_size // vision.patch_size) ** 2
    count = next(side**2 for side in range(2, 99) if side**2 > square)
    assert tile_side(model, range(count)) ** 2 == square
