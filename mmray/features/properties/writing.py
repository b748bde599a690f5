"""What greedy captions become when neurons are changed: whether the noun goes, and other captions stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from mmray.data.images import decode_image
from mmray.features.census.shard import Captioned
from mmray.features.properties.effects import MATCHED, noise
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import MOST, SIGMAS, WRITTEN
from mmray.features.properties.subject import Neurons, Subject
from mmray.models.generation import caption_of, generate
from mmray.models.interventions import ablate
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import prompt_text
from mmray.neurons import controls


class Writing:
    """Captions before and after; those before are kept, for images serve many concepts."""

    def __init__(self) -> None:
        self.before: dict[str, str] = {}

    def observe(self, subject: Subject, found: Observations) -> None:
        """Observe which captions lose the noun, and which others stay, with the most neurons changed."""
        items = _some(subject)
        missing = [item for item in items if item.sample.sample_id not in self.before]
        for item, text in zip(missing, written(subject, missing), strict=True):
            self.before[item.sample.sample_id] = text
        ranked = subject.facts.ranked
        matched = controls.layer_matched(
            subject.model.widths, ranked["score"].neurons, f"{subject.facts.concept} {MOST}"
        )
        sets: dict[str, Neurons] = {"score": ranked["score"].neurons, MATCHED: matched}
        for method, neurons in sets.items():
            self._changed(subject, found, items, "zeroed", (method, None), ablate(subject.model, neurons))
        sigma = max(SIGMAS)
        change = noise(subject.model, sets["score"], sigma)
        self._changed(subject, found, items, "noise", ("score", sigma), change)

    def _changed(
        self,
        subject: Subject,
        found: Observations,
        items: Sequence[Captioned],
        change: str,
        how: tuple[str, float | None],
        block: AbstractContextManager[None],
    ) -> None:
        concept, own = subject.facts.concept, set(subject.own_samples)
        with block:
            texts = written(subject, items)
        removed, kept = (Key("causal", f"{change}_{part}", how[0], MOST, how[1]) for part in ("removed", "kept"))
        for item, text in zip(items, texts, strict=True):
            name = item.sample.sample_id
            if name not in own:
                found.add(kept, concept, name, text == self.before[name])
            elif _names(subject, item, self.before[name]):
                found.add(removed, concept, name, not _names(subject, item, text))


def written(subject: Subject, items: Sequence[Captioned]) -> list[str]:
    """Return the model's own captions of these images."""
    parts = within_budget(items, lambda item: pixels_of(subject.model, item.sample.image), BUDGET)
    return [text for part in parts for text in _written_together(subject, part)]


def _written_together(subject: Subject, items: Sequence[Captioned]) -> list[str]:
    settings, model = subject.study.settings, subject.model
    prompts = [prompt_text(model, settings.prompt, item.sample.language, prefix=settings.prefix) for item in items]
    images = [decode_image(item.sample.image or b"", item.sample.background) for item in items]
    return [caption_of(model, tokens)[0] for tokens in generate(model, prompts, images, settings.longest)]


def _some(subject: Subject) -> list[Captioned]:
    """Return some of the concept's images, and as many others."""
    own = set(subject.own_samples)
    parts: tuple[list[Captioned], list[Captioned]] = ([], [])
    for item in subject.items:
        parts[item.sample.sample_id not in own].append(item)
    return parts[0][:WRITTEN] + parts[1][:WRITTEN]


def _names(subject: Subject, item: Captioned, text: str) -> bool:
    mentions = subject.study.nouns.find(text, item.sample.language, item.sample.objects)
    return any(mention.concept == subject.facts.concept for mention in mentions)
