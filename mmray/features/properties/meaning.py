"""Sensitivity, invariance and specificity of a concept's neurons, measured without changing the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from mmray.data.images import decode_image
from mmray.errors import InputError
from mmray.features.properties.measures import (
    common_share,
    exact_hit,
    highest,
    jaccard,
    lemma_hit,
    overlap,
    pairwise_jaccard,
    placements,
    set_mean,
)
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import DECODED, INVARIANCE_SIZES, RANKINGS
from mmray.features.properties.subject import Neurons, Ranked, Study, Subject
from mmray.models.encoder import Encoder
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons import controls

DRAWN = 20
"""Sets of random neurons per control: a single set either writes the noun or does not."""
CLIP_WEIGHT = 2.5
"""Factor w of CLIPScore."""
CLIP_TOKENS = 1
"""Tokens per neuron in the text for CLIP, which reads 77 tokens in all."""


def sensitivity(subject: Subject, found: Observations) -> None:
    """Measure whether neurons write the noun: those of the rankings, each image's own highest, and random ones."""
    concept, study, ranked = subject.inputs.concept, subject.study, subject.inputs.ranked
    # A ranking is one per concept, not per image, so here the bootstrap draws concepts.
    for method in RANKINGS:
        _add_hits(subject, found, method, concept, [tokens_in_run(study, ranked[method])])
    located = ranked["score"].neurons[:DECODED]
    for method, draw in (("layer-matched", controls.layer_matched), ("uniform", controls.uniform)):
        # Seeded by concept and number, so that the control is the same in every unit and run.
        drawn = [draw(subject.model.widths, located, f"{concept} {number}") for number in range(DRAWN)]
        _add_hits(subject, found, method, concept, [subject.written_here(study.indices(neurons)) for neurons in drawn])
    sets = highest(subject.contributions[subject.own], DECODED)
    for sample_id, chosen, activations in zip(subject.own_samples, sets, subject.own_activations, strict=True):
        indices = sorted(chosen)
        tokens = study.written_tokens(indices, activations[indices].tolist())
        _add_hits(subject, found, "image", sample_id, [tokens])


def tokens_in_run(study: Study, ranked: Ranked) -> list[list[str]]:
    """Return the tokens that each of a ranking's ten highest neurons writes, by its sign in the run."""
    return study.written_tokens(study.indices(ranked.neurons[:DECODED]), ranked.signs[:DECODED])


def _add_hits(subject: Subject, found: Observations, method: str, unit: str, sets: Sequence[list[list[str]]]) -> None:
    """Add the fraction of sets of neurons that write the noun, given the tokens of each neuron per set."""
    inputs = subject.inputs
    decoded = [list(chain.from_iterable(tokens)) for tokens in sets]
    hits = {
        "exact_hit_rate": [exact_hit(tokens, inputs.token) for tokens in decoded],
        "lemma_hit_rate": [lemma_hit(tokens, inputs.concept, inputs.token, inputs.language) for tokens in decoded],
    }
    for measure, outcomes in hits.items():
        key = Key("sensitivity", measure, method, DECODED)
        found.add(key, inputs.concept, unit, sum(outcomes) / len(outcomes))


def text_similarity(subject: Subject, found: Observations, encoder: Encoder) -> None:
    """Measure how similar the written tokens and the noun are; control: another concept's neurons."""
    inputs = subject.inputs
    for method, ranked in (("score", inputs.ranked["score"]), ("random pairing", inputs.paired)):
        values = similarities(encoder, tokens_in_run(subject.study, ranked), inputs.concept)
        for measure, value in values.items():
            found.add(Key("sensitivity", measure, method, DECODED), inputs.concept, inputs.concept, value)


def similarities(encoder: Encoder, tokens: Sequence[Sequence[str]], concept: str) -> dict[str, float]:
    """Return BERTScore and MoverScore of the noun and the tokens that each neuron writes, as one text."""
    text = ", ".join(chain.from_iterable(tokens))
    return {"bertscore": encoder.match(text, concept), "moverscore": encoder.move(text, concept)}


class Clip:
    """A CLIP checkpoint in a local folder; nothing is downloaded."""

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        if not (Path(folder).expanduser() / "config.json").is_file():
            raise InputError(f"--clip {folder}: no config.json there; give the folder of a CLIP checkpoint")
        try:
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
            self.network: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--clip {folder}: not a CLIP that transformers can load ({reason})") from error

    @torch.inference_mode()
    def scores(self, images: list[Image], text: str) -> list[float]:
        """Return the CLIPScore of each image with the text (Hessel et al. 2021)."""
        inputs = self.processor(text=[text], images=images, return_tensors="pt", padding=True, truncation=True)
        # CLIP scales its cosines by a learned temperature.
        cosines = self.network(**inputs.to(self.network.device)).logits_per_image[:, 0] / self.network.logit_scale.exp()
        return [float(CLIP_WEIGHT * max(cosine, 0.0)) for cosine in cosines.tolist()]


def image_similarity(subject: Subject, found: Observations, clip: Clip) -> None:
    """Measure CLIPScore of the written tokens and the concept's images; control: another concept's neurons."""
    for method, ranked in (("score", subject.inputs.ranked["score"]), ("random pairing", subject.inputs.paired)):
        key = Key("sensitivity", "clipscore", method, DECODED)
        clip_scores(subject, found, clip, key, tokens_in_run(subject.study, ranked))


def clip_scores(subject: Subject, found: Observations, clip: Clip, key: Key, tokens: Sequence[Sequence[str]]) -> None:
    """Add the CLIPScore of each of the concept's images and the tokens that each neuron writes."""
    own = set(subject.own_samples)
    own_images = [item.sample for item in subject.items if item.sample.sample_id in own]
    text = ", ".join(token for each in tokens for token in each[:CLIP_TOKENS])
    for part in within_budget(own_images, lambda sample: pixels_of(subject.model, sample.image), BUDGET):
        scores = clip.scores([decode_image(sample.image or b"", sample.background) for sample in part], text)
        found.extend(key, subject.inputs.concept, [sample.sample_id for sample in part], scores)


def invariance(subject: Subject, found: Observations) -> None:
    """Measure whether the same neurons are highest in other images of the concept; control: images of other nouns."""
    concept, samples, own = subject.inputs.concept, subject.own_samples, subject.own
    for size in INVARIANCE_SIZES:
        sets, other_sets = (highest(subject.contributions[part], size) for part in (own, ~own))
        rows = {
            Key("image_invariance", "jaccard", "contribution", size): pairwise_jaccard(sets),
            Key("image_invariance", "jaccard", "other nouns", size): [
                sum(jaccard(one, other) for other in other_sets) / len(other_sets) for one in sets
            ],
        }
        for key, values in rows.items():
            found.extend(key, concept, samples, values)
        key = Key("image_invariance", "common_share", "contribution", size)
        found.add(key, concept, concept, common_share(sets))


def region_invariance(subject: Subject, again: Subject | None, found: Observations) -> None:
    """Measure whether the same neurons are highest with the image's patches permuted; control: other images' nouns.

    The caption is that of the run, or the one that the model writes about the permuted patches (`again`).
    """
    if not subject.model.parts.image_in_sequence:
        # Without patches in the decoder's sequence nothing would be permuted, and the overlap would always be 1.
        return
    own, concept, samples = subject.own, subject.inputs.concept, subject.own_samples
    kept = set(again.own_samples) if again else set()
    key = Key("region_invariance", "regenerated_named", "none")
    found.extend(key, concept, samples, [name in kept for name in samples])
    moved = subject.scores(permuted=True)
    for size in INVARIANCE_SIZES:
        sets, permuted, other_sets = (
            highest(scores, size) for scores in (subject.contributions[own], moved[own], moved[~own])
        )
        rows = {
            ("overlap", "contribution"): dict(zip(samples, map(overlap, sets, permuted), strict=True)),
            ("overlap", "other images"): dict(zip(samples, _mean_overlaps(sets, other_sets), strict=True)),
        }
        if again:
            new_sets = highest(again.scores(permuted=True)[again.own], size)
            before = [sets[samples.index(name)] for name in again.own_samples]
            pairs = {"contribution": map(overlap, before, new_sets), "other images": _mean_overlaps(before, other_sets)}
            for method, overlaps in pairs.items():
                rows["overlap_regenerated", method] = dict(zip(again.own_samples, overlaps, strict=True))
        for (measure, method), values in rows.items():
            found.extend(Key("region_invariance", measure, method, size), concept, list(values), values.values())


def _mean_overlaps(sets: Sequence[frozenset[int]], others: Sequence[frozenset[int]]) -> list[float]:
    """Return each set's mean overlap with the others."""
    return [sum(overlap(one, other) for other in others) / len(others) for one in sets]


def specificity(subject: Subject, found: Observations) -> None:
    """Measure the neurons' contribution to the concept's noun and to others, and whether it separates the two."""
    inputs, study, own = subject.inputs, subject.study, subject.own
    sets: dict[str, Neurons] = {name: inputs.ranked[name].neurons[:DECODED] for name in RANKINGS}
    sets["layer-matched"] = controls.layer_matched(subject.model.widths, sets["score"], inputs.concept)
    for method, neurons in sets.items():
        means = set_mean(subject.contributions, torch.tensor(study.indices(neurons)))
        own_parts, other_parts = placements(means[own], means[~own])
        rows = (
            ("auroc", subject.own_samples, own_parts),
            ("own_score", subject.own_samples, means[own]),
            ("other_score", subject.other_samples, means[~own]),
        )
        for measure, samples, values in rows:
            found.extend(Key("specificity", measure, method, DECODED), inputs.concept, samples, values.tolist())
        # Deviations of the other side change no mean, hence the denominator 0, but they widen the interval.
        for sample_id, value in zip(subject.other_samples, other_parts.tolist(), strict=True):
            found.add(Key("specificity", "auroc", method, DECODED), inputs.concept, sample_id, value, of=0.0)
