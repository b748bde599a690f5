"""What an edit must leave alone: captions, answers about images, text-only replies, and plain texts.

Each kind has a part to learn from and a part held out, by which tries are compared. An image is in one part only.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmray.data.image_keys import one_per_image
from mmray.errors import InputError
from mmray.features.editing.dataset import EditDataset, Example, Prompt
from mmray.features.editing.resumed_forward import recorded
from mmray.features.editing.settings import EditSettings
from mmray.models.generation import generate
from mmray.models.loading import LoadedModel
from mmray.models.prompting import prompt_text, tokenize_caption
from mmray.neurons.concepts import find_forms
from mmray.neurons.split_on_oom import FAILURES
from mmray.objects.prompts import presence
from mmray.storage import open_object

KEPT_TEXT = Path(__file__).with_name("kept_text.json")
"""The general set of prompts and texts that comes with the package."""
KEPT, KEPT_BY_SMALL, SMALL = 256, 512, 30_000_000
"""Images whose captions must stay, the same in a swap of a small model, and the parameters of the largest small one."""
ASKED = 32
"""Images that questions are asked about."""
LONGEST_ANSWER = 16
"""Tokens of an answer about an image."""
LONGEST_TEXT, LEARNED_TEXT = 64, 32
"""Tokens of a text-only reply that is held out, and of one that is learned from: longer ones take twice as long and say
little more."""
HELD_OUT = 4
"""One of so many is held out."""


@dataclass(frozen=True)
class KeptAnswers:
    """The answers that an edit must leave alone, by kind: captions, answers, replies, texts."""

    learned: dict[str, list[Example]]
    held_out: dict[str, list[Example]]

    @property
    def every(self) -> list[Example]:
        """The answers to learn from, of all kinds."""
        return [example for examples in self.learned.values() for example in examples]


def kept_answers(
    dataset: EditDataset, captions: Sequence[Example], words: Sequence[str], keep_text: str | None, seed: int
) -> KeptAnswers:
    """Return these captions, and the model's answers about some of their images and without any image, in two parts.

    `words` are those of the edit, about which a quarter of the questions ask. Raises InputError if `keep_text` can't
    be read.
    """
    kinds = {"captions": list(captions), "answers": presence_answers(dataset, captions, words, seed)}
    kinds |= text_answers(dataset, keep_text)
    return KeptAnswers(
        {kind: [one for one in examples if not _is_held_out(one)] for kind, examples in kinds.items()},
        {kind: [one for one in examples if _is_held_out(one)] for kind, examples in kinds.items()},
    )


def _is_held_out(one: Example | Prompt) -> bool:
    # By what is asked about, so that the caption of an image and answers about it are in the same part.
    about = one.image or one.prompt.encode()
    return int.from_bytes(hashlib.sha256(about).digest()[:4]) % HELD_OUT == 0


def presence_answers(
    dataset: EditDataset, captions: Sequence[Example], words: Sequence[str], seed: int
) -> list[Example]:
    """Return the model's answers to whether objects are in the first of these captions' images.

    Two per image: one object that is there, and one that is not. Every other absent one is a word of the edit, whose
    answers are the first to change.
    """
    rng = random.Random(seed)
    queries = []
    for number, caption in enumerate(captions[:ASKED]):
        sample = dataset.samples[caption.sample_id]
        shown = sorted(dataset.present(sample))
        absent = [name for name in (words if number % 2 else dataset.run.concepts) if name not in shown]
        if sample.image is not None and shown and absent:
            for name in (rng.choice(shown), rng.choice(absent)):
                prompt = prompt_text(dataset.model, presence(name), dataset.language)
                queries.append(Prompt(prompt, sample.image, sample.background))
    return dataset.replies(queries, LONGEST_ANSWER)


def text_answers(dataset: EditDataset, uri: str | None) -> dict[str, list[Example]]:
    """Return the model's replies to prompts without an image, and texts themselves, as continuations of a first word.

    There are none for a model that reads an image with every prompt. Raises InputError if `uri` can't be read.
    """
    if uri not in dataset.text_answers:
        found = read_kept_text(uri)
        dataset.text_answers[uri] = _text_answers(dataset, found) if _answers_without_image(dataset.model) else {}
    return dataset.text_answers[uri]


def _text_answers(dataset: EditDataset, found: Mapping[str, Sequence[str]]) -> dict[str, list[Example]]:
    model = dataset.model
    queries = [Prompt(prompt_text(model, prompt, dataset.language, image=False)) for prompt in found["prompts"]]
    begun = map(_begun, found["texts"])
    continued = [Example(first, None, tuple(tokenize_caption(model, first, rest)[0])) for first, rest in begun]
    return {
        "replies": [
            *dataset.replies([one for one in queries if not _is_held_out(one)], LEARNED_TEXT),
            *dataset.replies([one for one in queries if _is_held_out(one)], LONGEST_TEXT),
        ],
        "texts": recorded(model, continued),
    }


def _answers_without_image(model: LoadedModel) -> bool:
    """Return whether the model takes a prompt without an image, which BLIP-2, IDEFICS, PaliGemma and others don't."""
    try:
        generate(model, [prompt_text(model, "Hello", "en", image=False)], [None], 1)
    except torch.OutOfMemoryError:
        raise
    except (InputError, *FAILURES):
        return False
    return True


def read_kept_text(uri: str | None) -> dict[str, list[str]]:
    """Return the prompts and texts of a JSON file, or of the set that comes with the package.

    Raises InputError if there is no such file, or if it doesn't have two lists of texts.
    """
    if uri is None:
        return dict(json.loads(KEPT_TEXT.read_text("utf-8")))
    store, name = open_object(uri)
    try:
        content = json.loads(store.read(name))
        found = {key: content[key] for key in ("prompts", "texts")}
    except FileNotFoundError:
        raise InputError(f"--keep-text {uri}: no such file; give JSON with the lists prompts and texts") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--keep-text {uri}: not JSON with the lists prompts and texts; correct it") from None
    for key, texts in found.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"--keep-text {uri}: {key} is no list of texts; correct it")
    stripped = {key: [text.strip() for text in texts] for key, texts in found.items()}
    # A text of one character has nothing to continue.
    return {key: [text for text in stripped[key] if len(text) > (key == "texts")] for key in stripped}


def _begun(text: str) -> tuple[str, str]:
    """Return the first word of a text and the rest; of one without blanks, such as Chinese, the first character."""
    first, blank, rest = text.partition(" ")
    return (first, rest) if blank else (text[:1], text[1:])


def images_to_keep(model: LoadedModel, settings: EditSettings) -> int:
    """Return of how many images the captions must stay: as asked, or else by the kind of edit and size of the model."""
    if settings.kept is not None:
        return settings.kept
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    return KEPT_BY_SMALL if settings.source and parameters <= SMALL else KEPT


def kept(
    dataset: EditDataset, without: Iterable[str], most: int, seed: int, first: Iterable[str] = ()
) -> list[Example]:
    """Return the model's own captions of images without any concept in `without`, which the edit must not change.

    Up to half of them are of the samples `first`, in their order; the others are drawn at random. Each is of a
    different image. An image is left out if any of its samples' captions names such a concept, or the model does.
    """
    without, images = list(without), dataset.images
    # By image: another caption of the same image may name a concept that this one leaves out.
    shown = {images[name] for name in dataset.ids(without)}
    others = [name for name in dataset.ids() if images[name] not in shown]
    random.Random(seed).shuffle(others)
    # Only half, because captions picked for their neurons or target don't represent the rest of the data.
    preferred = one_per_image((name for name in first if images[name] not in shown), images)[: most // 2]
    chosen = one_per_image([*preferred, *others], images)[:most]
    samples = [sample for sample in dataset.read(chosen) if not set(without) & set(sample.objects or ())]
    return [
        dataset.example(sample, tokens, tokens)
        for sample, tokens in zip(samples, dataset.own_captions(samples, cache=True), strict=True)
        if not find_forms(dataset.text(tokens), frozenset(without), dataset.language)
    ]
