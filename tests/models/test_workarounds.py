"""Faults of transformers are repaired, and would be noticed without the repair."""

import pytest
import torch

from mmray.models import workarounds
from mmray.models.loading import load
from mmray.models.processing import noise_image
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.models.tiny.kind_checkpoints import build
from mmray.neurons.validation import later_words_hidden


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return build("hunyuan_vl", tmp_path_factory.mktemp("hunyuan"))


def logits(model, images):
    """Return the logits after a caption of each image, run in one batch."""
    prompt = prompt_text(model, None, "en")
    tokens, offsets = tokenize_caption(model, prompt, "A dog.")
    batch = encode(model, [prompt] * len(images), images, [tokens] * len(images), [offsets] * len(images))
    with torch.inference_mode():
        found = model.network(**batch.to(model.device, model.network.dtype)).logits
    return [row[start : start + len(tokens)] for row, start in zip(found, batch.caption_start, strict=True)]


def test_images_are_numbered_by_row(hunyuan):
    """HunYuan-VL numbers them through the whole batch: an image would depend on what is before it."""
    model = load(str(hunyuan))
    image, wide = noise_image(), noise_image().resize((150, 80))
    together = logits(model, [image, wide, image])
    assert torch.equal(together[0], together[2])
    for found, alone in zip(together, (image, wide), strict=False):
        torch.testing.assert_close(found, logits(model, [alone])[0], rtol=1e-4, atol=1e-4)
    assert later_words_hidden(model)[0]


def test_without_the_repair_the_model_is_not_proven(hunyuan, monkeypatch):
    monkeypatch.setattr(workarounds, "_by_row", lambda positions_of: positions_of)
    passed, detail = later_words_hidden(load(str(hunyuan)))
    assert not passed, detail
