"""The training job end to end, at its smallest."""

import json
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs.demo import train
from jobs.demo.captions import LANGUAGES
from jobs.demo.scenes import World
from mmray.detector.heads import FACTS, load_heads
from mmray.models.loading import load


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Leave the precision of products as other tests have it."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_heads_of_a_detector_are_left_and_trained_further(tmp_path, capsys):
    told = []
    for _ in range(2):
        train.main(tmp_path / "heads", seconds=1, detector=True, smoke=True)
        said = capsys.readouterr().out
        assert "pointing" in said and "recall" in said
        told.append(json.loads((tmp_path / "heads" / FACTS).read_text()))
    assert told[1]["scenes"] > told[0]["scenes"] > 0
    assert told[1]["seconds"] == 2 * told[0]["seconds"]
    load_heads(tmp_path / "heads", load("demo"))


@pytest.mark.slow
def test_the_smoke_run_leaves_a_checkpoint_that_captions_an_image(tmp_path, capsys):
    train.main(tmp_path, seconds=2, batch_size=4, smoke=True)
    said = capsys.readouterr().out
    for measure in ("recall", "CHAIR_i", "planted hallucination", "recall, Chinese", "question accuracy", "text-only"):
        assert f"\n{measure}" in said

    processor = AutoProcessor.from_pretrained(tmp_path)
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.float16
    assert not report["missing_keys"] and not report["unexpected_keys"]

    world = World.load()
    image = world.render(world.sample(1, seed=0))[0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": LANGUAGES["en"].prompt}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    written = model.float().generate(**inputs, max_new_tokens=8, do_sample=False)
    assert written.shape[1] > inputs.input_ids.shape[1]
    assert isinstance(processor.decode(written[0], skip_special_tokens=True), str)
