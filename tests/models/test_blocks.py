"""Blocks run once more give what they gave, and the image's patches in another order change what is seen of them."""

import pytest
import torch

from mmray.models.blocks import BlockRecorder, permuted_image
from mmray.models.capture import capture_input
from mmray.neurons.activation_cache import forward
from mmray.neurons.scoring import score_batch
from tests.support.samples import CAPTIONS, batch_of


@pytest.mark.parametrize("variant", ["llava", "gemma3", "blip2_opt", "qwen3_vl_moe"])
def test_the_last_blocks_give_what_they_gave(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:3])
    recorder, ends = BlockRecorder(model), []
    with torch.inference_mode():
        with recorder.recording(), capture_input(model.norm, ends.append):
            forward(model, batch)
        read = torch.arange(0, len(batch.tokens) * batch.positions, 3)
        again = recorder.resume(len(recorder.blocks) - 1, read)
    torch.testing.assert_close(again, ends[-1].flatten(0, -2)[read], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llava", "qwen3_vl", "mllama"])
def test_calls_from_any_block_on_repeat_the_forward(open_model, variant):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:2])
    recorder = BlockRecorder(model, first=1)
    with torch.inference_mode():
        with recorder.recording():
            forward(model, batch)
        hidden = recorder.outputs[1]
        for call in recorder.calls(1):
            hidden = call.run(hidden)
    torch.testing.assert_close(hidden, recorder.outputs[max(recorder.outputs)], rtol=1e-4, atol=1e-4)
    assert min(recorder.outputs) == 1


def test_a_recorder_leaves_no_hooks(open_model):
    model = open_model("llava")
    batch, _ = batch_of(model, CAPTIONS[:2])
    recorder = BlockRecorder(model)
    with torch.inference_mode(), recorder.recording():
        forward(model, batch)
    recorded = dict(recorder.outputs)
    assert len(recorded) == len(recorder.inputs) == len(model.widths)
    with torch.inference_mode():
        forward(model, batch)
    assert all(recorder.outputs[layer] is output for layer, output in recorded.items())


@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "gemma3"])
def test_permuted_patches_change_scores_and_are_put_back(open_model, variant):
    model = open_model(variant)
    batch, places = batch_of(model, CAPTIONS[:3])
    plain = score_batch(model, batch, places)
    with permuted_image(model, batch, seed=1):
        moved = score_batch(model, batch, places)
    after = score_batch(model, batch, places)
    assert (moved.log_prob - plain.log_prob).abs().max() > 0
    assert torch.equal(after.log_prob, plain.log_prob)


def test_captions_and_prompts_are_not_permuted(open_model):
    model = open_model("llava")
    batch, _ = batch_of(model, CAPTIONS[:2])

    def entered() -> torch.Tensor:
        # The embeddings as the first block's own norm sees them: after the hook that permutes.
        states = []
        norm = model.network.get_submodule(model.projections[0].path.rsplit(".mlp", 1)[0] + ".input_layernorm")
        with torch.inference_mode(), capture_input(norm, states.append):
            forward(model, batch)
        return states[0]

    plain = entered()
    with permuted_image(model, batch, seed=3):
        moved = entered()
    for row in range(2):
        image = batch.image_positions(row)
        others = [position for position in range(batch.positions) if position not in image]
        assert torch.equal(plain[row, others], moved[row, others])
        assert not torch.equal(plain[row, image], moved[row, image])
        order = plain[row, image].sum(dim=1).sort().values
        torch.testing.assert_close(order, moved[row, image].sum(dim=1).sort().values)
