"""The training job end to end, at its smallest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs.demo.captions import LANGUAGES
from jobs.demo.scenes import World
from mmray.detector.heads import FACTS, load_heads
from mmray.models.loading import load

JOB = ["-m", "jobs.demo.train"]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_heads_of_a_detector_are_left_and_trained_further(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = []
    for _ in range(2):
        finished = subprocess.run(
            [sys.executable, *JOB, "--detector", "--smoke", "--seconds", "1", "--out", str(tmp_path / "heads")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert "pointing" in finished.stdout and "recall" in finished.stdout
        told.append(json.loads((tmp_path / "heads" / FACTS).read_text()))
    assert told[1]["scenes"] > told[0]["scenes"] > 0
    assert told[1]["seconds"] == 2 * told[0]["seconds"]
    load_heads(tmp_path / "heads", load("demo"))


@pytest.mark.slow
def test_the_smoke_run_leaves_a_checkpoint_that_captions_an_image(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--smoke", "--seconds", "2", "--batch-size", "4", "--out", str(tmp_path)]
    finished = subprocess.run(
        [sys.executable, *JOB, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for measure in ("recall", "CHAIR_i", "planted hallucination", "recall, Chinese", "question accuracy", "text-only"):
        assert f"\n{measure}" in finished.stdout

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
