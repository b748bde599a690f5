"""What the image goes through, and where it enters, is found by what changes with it."""

import re

import pytest
import torch

from mmray.models.image_probe import image_entry, image_modules
from mmray.models.parts import locate
from mmray.models.prompting import encode, run_processor
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import picture

ASKED = ("instructblip_vicuna", "instructblip_t5")
"""Families whose Q-Former reads the question next to the image: not the image's own MLPs."""


def first_block(parts):
    return re.match(r".*?\.0(?=\.)", parts.of("language")[0].path).group()


@pytest.mark.parametrize("variant", VARIANTS)
def test_vision_tower_and_projector_are_those_of_the_table(loaded, variant):
    model = loaded(variant)
    parts = locate(model.network)
    answer = {"decoder_input_ids": torch.tensor([[5, 6, 7, 8]])} if parts.encoder_decoder else {}
    found = image_modules(model.network, first_block(parts), model.processor, answer, parts.image)
    known = parts.of("vision") + (() if variant in ASKED else parts.of("projector"))
    # The table has Qwen3-VL's projectors in another order than they run.
    assert {(one.module, one.path, one.gate, one.width) for one in found} == {
        (one.module, one.path, one.gate, one.width) for one in known
    }
    for module in ("vision", "projector"):
        own = [one.layer for one in found if one.module == module]
        assert own == list(range(len(own)))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.endswith("t5")])
def test_the_placeholder_is_the_token_whose_positions_change_with_the_image(loaded, variant):
    model = loaded(variant)
    parts = locate(model.network)
    image, token, before = image_entry(model.network, first_block(parts), model.processor)
    assert (image, token) == (parts.image, parts.image_token_id if parts.image == "tokens" else None)
    assert before == 0


def test_an_image_before_the_text_has_as_many_positions_at_every_size(open_type):
    model = open_type("git")
    # A token of the whole image, and its patches.
    assert (model.parts.image_before, model.parts.image_token_id) == (1 + 16, None)
    batch = encode(model, ["What?", "A."], [picture(1), picture(2, 90, 30)], [[40, 41], [42]], [[(0, 1)] * 2, [(0, 1)]])
    assert batch.image_positions(0) == batch.image_positions(1) == list(range(17))
    logits = model.network(**batch.inputs).logits
    assert logits.shape[1] == batch.positions == 17 + batch.inputs["input_ids"].shape[1]
    for row, start in enumerate(batch.caption_start):
        assert batch.inputs["input_ids"][row, start - 17] == batch.tokens[row][0]
    # Without an image there are no positions for one.
    text = encode(model, ["What?"], [None], [[40]], [[(0, 1)]])
    assert text.image_positions(0) == []
    assert text.positions == text.inputs["input_ids"].shape[1] == text.caption_start[0] + 1


def test_an_end_token_of_the_tokenizer_does_not_end_the_prompt(open_type):
    model = open_type("git")
    end = model.tokenizer.eos_token_id
    assert model.processor(text="What?").input_ids[-1] == end
    features = run_processor(model, ["What?", "What? </s>"], [picture(1)] * 2)
    own = [
        row[mask.bool()].tolist() for row, mask in zip(*map(features.get, ("input_ids", "attention_mask")), strict=True)
    ]
    # What the prompt itself ends with stays.
    assert end not in own[0]
    assert own[1][-1] == end


def test_an_mlp_that_nothing_reads_is_no_projector(loaded):
    model = loaded("llava")
    network, parts = model.network, locate(model.network)
    hidden = network.config.vision_config.hidden_size
    head = torch.nn.Sequential(torch.nn.Linear(hidden, 40), torch.nn.GELU(), torch.nn.Linear(40, hidden))
    tower = network.get_submodule("model.vision_tower")
    tower.add_module("head", head)

    # It runs, and its output is thrown away.
    def use(tower, _, output):
        tower.head(output[0])

    hook = tower.register_forward_hook(use)
    try:
        found = image_modules(network, first_block(parts), model.processor, {})
    finally:
        hook.remove()
        del tower.head
    assert {one.path for one in found} == {one.path for one in parts.projections if one.module != "language"}
