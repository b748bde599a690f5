"""What the demo model is trained on and how it is measured, without training it."""

import json
import math

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from jobs.demo.architecture import CHAT_TEMPLATE, IMAGE_TOKENS, build_model, build_processor, train_tokenizer
from jobs.demo.measures import caption_measures
from jobs.demo.scenes import COMPANIONS, DOMAINS, World
from jobs.demo.training import Batches, batch_loss
from mmray.demo import MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(scene_count=300)


@pytest.fixture(scope="module")
def batch(tokenizer):
    return next(iter(Batches(tokenizer, batch_size=8)))


def test_training_and_processor_see_the_same_prompt(tokenizer, batch):
    processor = build_processor(tokenizer)
    by_prompt = {}
    for ids, labels in zip(batch.exchanges.ids, batch.exchanges.labels, strict=True):
        prompt = ids[: int((labels == -100).int().argmin())]
        by_prompt[tokenizer.decode(prompt[prompt != processor.image_token_id], skip_special_tokens=True)] = prompt
    for text, prompt in by_prompt.items():
        asked = text.split("USER:")[1].split("ASSISTANT:")[0].strip()
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
        image = Image.new("RGB", (96, 96))
        written = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert processor(text=written, images=image, return_tensors="pt").input_ids[0].tolist() == prompt.tolist()


def test_training_and_processor_see_the_same_pixels(tokenizer):
    images = World.load().render(World.load().sample(4, seed=0))
    prepared = build_processor(tokenizer).image_processor(
        [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt"
    )
    assert torch.allclose(prepared.pixel_values, images / 127.5 - 1, atol=1e-5)


def test_labels_are_the_answers_and_the_end(tokenizer, batch):
    for tokens, image_tokens in ((batch.exchanges, IMAGE_TOKENS), (batch.without_image, 0)):
        assert (tokens.ids == tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [image_tokens] * len(
            tokens.ids
        )
        for ids, labels in zip(tokens.ids, tokens.labels, strict=True):
            learned = labels[labels != -100]
            assert learned[-1] == tokenizer.eos_token_id
            spoken = tokenizer.decode(ids, skip_special_tokens=True)
            assert spoken.endswith(tokenizer.decode(learned, skip_special_tokens=True))


def test_batches_differ_between_workers_and_repeat_with_the_seed(tokenizer, batch):
    assert next(iter(Batches(tokenizer, batch_size=8))).scenes == batch.scenes
    assert next(iter(Batches(tokenizer, batch_size=8, seed=101))).scenes != batch.scenes


def test_a_new_model_knows_nothing(tokenizer, batch):
    torch.manual_seed(0)
    loss = batch_loss(build_model(tokenizer), World.load(), batch)
    chance = math.log(len(tokenizer))
    assert abs(loss.item() / (1.3 * chance) - 1) < 0.05  # the questions without an image count 0.3


def test_the_embedded_model_is_of_this_recipe():
    processor = AutoProcessor.from_pretrained(MODEL)
    assert processor.chat_template.strip() == CHAT_TEMPLATE
    recipe = build_model(processor.tokenizer).config.to_dict()
    embedded = json.loads((MODEL / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        for name, value in embedded[part].items():
            assert recipe[part].get(name, value) == value, f"{part}.{name}"


@pytest.mark.slow
def test_the_embedded_vocabulary_is_of_this_recipe():
    embedded = json.loads((MODEL / "tokenizer.json").read_text())
    assert train_tokenizer(scene_count=30_000).get_vocab() == {
        **embedded["model"]["vocab"],
        **{token["content"]: token["id"] for token in embedded["added_tokens"]},
    }


def test_measures_count_what_captions_name_and_invent():
    sampled = World.load().sample(5000, seed=0)
    cat = next(scene for scene in sampled if scene.objects[0] == "cat" and "mouse" not in scene.objects)
    other = next(scene for scene in sampled if len(scene.objects) == 1 and scene.objects[0] not in COMPANIONS)
    measures = caption_measures([cat, other], ["An image of a cat and a mouse.", "An image of nothing."])
    objects = len(cat.objects) + 1
    assert (measures["recall"].value, measures["recall"].count) == (pytest.approx(1 / objects), objects)
    assert sum(measures[f"recall, {domain}"].count for domain in DOMAINS) == objects
    assert (measures["CHAIR_i"].value, measures["CHAIR_i"].count) == (0.5, 2)
    assert (measures["planted hallucination"].value, measures["planted hallucination"].count) == (1.0, 1)
