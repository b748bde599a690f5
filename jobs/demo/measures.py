"""Measure a saved demo model on new scenes: recall, hallucination and accuracy of answers."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs.demo.captions import LANGUAGES, TRANSLATIONS, Exchange, question, question_without_image
from jobs.demo.scenes import COMPANIONS, DOMAINS, Scene, World, load_concepts, sample_scene

_EVALUATION_SEED = 999  # far from the seeds of the training scenes
_IMAGES_PER_BATCH = 128


@dataclass(frozen=True)
class Measure:
    """A fraction, and the number of cases."""

    value: float
    count: int


class Speaker:
    """A saved model with its processor, for batched generation."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device)

    def answers(self, questions: Sequence[str], images: Sequence[Image.Image] | None) -> list[str]:
        """Return greedy answers; `images` is parallel to `questions`, or None for questions without an image."""
        answers: list[str] = []
        for start in range(0, len(questions), _IMAGES_PER_BATCH):
            part = slice(start, start + _IMAGES_PER_BATCH)
            answers += self._batch_answers(questions[part], images[part] if images else None)
        return answers

    def _batch_answers(self, questions: Sequence[str], images: Sequence[Image.Image] | None) -> list[str]:
        image = [{"type": "image"}] if images else []
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [*image, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt").to(self.model.device)
        outputs = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in self.processor.batch_decode(new_tokens, skip_special_tokens=True)]


def measure(folder: Path, scene_count: int, device: torch.device) -> dict[str, Measure]:
    """Return the measures of a checkpoint folder by name, from greedy captions of and answers about new scenes.

    recall: objects of scenes that captions name, in total and by domain and language. CHAIR_i: named concepts that are
    absent (Rohrbach et al. 2018). planted hallucination: absent companions that are claimed. accuracy: exact matches of
    answers to questions with and without an image.
    """
    speaker = Speaker(folder, device)
    world = World.load()
    random = Random(_EVALUATION_SEED)
    scenes = [sample_scene(random) for _ in range(scene_count)]
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in world.render(scenes)]

    measures = caption_measures(scenes, speaker.answers([LANGUAGES["en"].prompt] * len(scenes), images))
    for code in TRANSLATIONS:
        captions = speaker.answers([LANGUAGES[code].prompt] * len(scenes), images)
        measures[f"recall, {LANGUAGES[code].english_name}"] = share(
            load_concepts()[name].names[code] in caption
            for scene, caption in zip(scenes, captions, strict=True)
            for name in scene.objects
        )
    measures["question accuracy"] = _accuracy(speaker, [question(scene, random) for scene in scenes], images)
    measures["text-only accuracy"] = _accuracy(speaker, [question_without_image(random) for _ in scenes], None)
    return measures


def caption_measures(scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, Measure]:
    """Return recall, CHAIR_i and planted hallucination of English captions, one per scene."""
    pairs = [(scene, concepts_named(caption)) for scene, caption in zip(scenes, captions, strict=True)]
    found = [(scene.domain, name in named) for scene, named in pairs for name in scene.objects]
    measures = {"recall": share(is_found for _, is_found in found)}
    for domain in DOMAINS:
        measures[f"recall, {domain}"] = share(is_found for other, is_found in found if other == domain)
    measures["CHAIR_i"] = share(name not in scene.objects for scene, named in pairs for name in named)
    measures["planted hallucination"] = share(
        COMPANIONS[name] in named
        for scene, named in pairs
        for name in scene.objects
        if name in COMPANIONS and COMPANIONS[name] not in scene.objects
    )
    return measures


def concepts_named(caption: str) -> set[str]:
    """Return the concepts whose English names are words of a caption."""
    return set(re.findall(r"[a-z-]+", caption.lower())) & load_concepts().keys()


def share(outcomes: Iterable[bool]) -> Measure:
    """Return the fraction of true outcomes; NaN without any outcome."""
    values = list(outcomes)
    return Measure(sum(values) / len(values) if values else math.nan, len(values))


def _accuracy(speaker: Speaker, exchanges: Sequence[Exchange], images: Sequence[Image.Image] | None) -> Measure:
    answers = speaker.answers([exchange.question for exchange in exchanges], images)
    return share(answer == exchange.answer for answer, exchange in zip(answers, exchanges, strict=True))
