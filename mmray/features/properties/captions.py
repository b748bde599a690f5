"""Greedy captions: before and after neurons are changed, and of images with their patches in another order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from mmray.data.images import decode_image
from mmray.features.census.shard import Captioned
from mmray.features.properties.effects import LAYER_MATCHED, noise
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import CAPTIONED, MOST, SIGMAS
from mmray.features.properties.subject import Neurons, Subject
from mmray.models.blocks import permuted_prompt_image
from mmray.models.generation import caption_of, generate
from mmray.models.interventions import ablate
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import encode, prompt_text
from mmray.neurons import controls


class CaptionChanges:
    """Captions before and after changes. Those before are cached, because an image serves many concepts."""

    def __init__(self) -> None:
        self.before: dict[str, str] = {}

    def observe(self, subject: Subject, found: Observations) -> None:
        """Measure which captions lose the noun, and which others stay, with MOST neurons changed."""
        items = _items_to_caption(subject)
        missing = [item for item in items if item.sample.sample_id not in self.before]
        for item, text in zip(missing, greedy_captions(subject, missing), strict=True):
            self.before[item.sample.sample_id] = text
        ranked = subject.inputs.ranked
        matched = controls.layer_matched(
            subject.model.widths, ranked["score"].neurons, f"{subject.inputs.concept} {MOST}"
        )
        sets: dict[str, Neurons] = {"score": ranked["score"].neurons, LAYER_MATCHED: matched}
        for method, neurons in sets.items():
            self._compare(subject, found, items, "zeroed", (method, None), ablate(subject.model, neurons))
        # Generation is slow, so only the largest noise is captioned.
        sigma = max(SIGMAS)
        change = noise(subject.model, sets["score"], sigma)
        self._compare(subject, found, items, "noise", ("score", sigma), change)

    def _compare(
        self,
        subject: Subject,
        found: Observations,
        items: Sequence[Captioned],
        kind: str,
        method_and_strength: tuple[str, float | None],
        change: AbstractContextManager[None],
    ) -> None:
        concept, own = subject.inputs.concept, set(subject.own_samples)
        method, strength = method_and_strength
        with change:
            texts = greedy_captions(subject, items)
        removed, kept = (Key("causal", f"{kind}_{part}", method, MOST, strength) for part in ("removed", "kept"))
        for item, text in zip(items, texts, strict=True):
            sample_id = item.sample.sample_id
            # Identical to the letter: greedy decoding of an unaffected image gives the same text.
            if sample_id not in own:
                found.add(kept, concept, sample_id, text == self.before[sample_id])
            # A noun that the model does not write anyway can't be removed.
            elif _names_concept(subject, item, self.before[sample_id]):
                found.add(removed, concept, sample_id, not _names_concept(subject, item, text))


def greedy_captions(subject: Subject, items: Sequence[Captioned], *, permuted: bool = False) -> list[str]:
    """Return the captions that the model writes for these images; `permuted`: with their patches in another order."""
    parts = within_budget(items, lambda item: pixels_of(subject.model, item.sample.image), BUDGET)
    # A call per part: a local list of images would keep one part's pixels alive while the next is decoded.
    return [text for part in parts for text in _captions_together(subject, part, permuted=permuted)]


def _captions_together(subject: Subject, items: Sequence[Captioned], *, permuted: bool) -> list[str]:
    settings, model = subject.study.settings, subject.model
    prompts = [
        prompt_text(model, item.sample.asked(settings.prompt), item.sample.language, prefix=settings.prefix)
        for item in items
    ]
    images = [decode_image(item.sample.image or b"", item.sample.background) for item in items]
    nothing: list[list[int]] = [[] for _ in items]
    batch = encode(model, prompts, images, nothing, [[] for _ in items]) if permuted else None
    with permuted_prompt_image(model, batch) if batch else nullcontext():
        return [caption_of(model, tokens)[0] for tokens in generate(model, prompts, images, settings.longest)]


def regenerated(subject: Subject) -> Subject | None:
    """Return the concept's images with the captions that the model writes about their permuted patches.

    Only images that are still said to show the concept are in it. None if there is no such image, or if the decoder's
    sequence holds no image.
    """
    if not subject.model.parts.image_in_sequence:
        return None
    own = set(subject.own_samples)
    items = [item for item in subject.items if item.sample.sample_id in own]
    texts = greedy_captions(subject, items, permuted=True)
    samples = [
        replace(item.sample, caption=text)
        for item, text in zip(items, texts, strict=True)
        if _names_concept(subject, item, text)
    ]
    found = subject.study.encoded(samples) if samples else None
    again = Subject(subject.study, subject.inputs, *found) if found else None
    return again if again and again.own_samples else None


def _items_to_caption(subject: Subject) -> list[Captioned]:
    """Return the first CAPTIONED of the concept's images, and as many others."""
    own = set(subject.own_samples)
    with_concept = [item for item in subject.items if item.sample.sample_id in own]
    others = [item for item in subject.items if item.sample.sample_id not in own]
    return with_concept[:CAPTIONED] + others[:CAPTIONED]


def _names_concept(subject: Subject, item: Captioned, text: str) -> bool:
    mentions = subject.study.nouns.find(text, item.sample.language, item.sample.objects)
    return any(mention.concept == subject.inputs.concept for mention in mentions)
