"""Sensitivity, invariance and specificity of a concept's neurons, from what plain forwards show."""

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
from mmray.models.blocks import permuted_image
from mmray.models.encoder import Encoder
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons import controls
from mmray.neurons.scoring import score_batch

DRAWN = 20
"""Sets of random neurons that a floor is the mean of: of one set a concept either is written, or is not."""
CLIP_WEIGHT = 2.5
CLIP_TOKENS = 1
"""Tokens of each neuron in the text that CLIP reads: it takes 77 in all."""


def sensitivity(subject: Subject, found: Observations) -> None:
    """Observe whether written tokens are the noun: the run's ranking's, each image's own highest, random neurons'."""
    concept, study, ranked = subject.facts.concept, subject.study, subject.facts.ranked
    # A concept has one ranking, whatever its images: here concepts are what is drawn.
    for method in RANKINGS:
        _hits(subject, found, method, concept, [_written(study, ranked[method])])
    best = ranked["score"].neurons[:DECODED]
    for method, draw in (("layer-matched", controls.layer_matched), ("uniform", controls.uniform)):
        drawn = [draw(subject.model.widths, best, f"{concept} {number}") for number in range(DRAWN)]
        _hits(subject, found, method, concept, [subject.written_here(study.numbers(neurons)) for neurons in drawn])
    own = subject.contributions[subject.own]
    for sample_id, chosen, signed in zip(subject.own_samples, highest(own, DECODED), subject.signed, strict=True):
        numbers = sorted(chosen)
        _hits(subject, found, "image", sample_id, [study.written(numbers, signed[numbers].tolist())])


def _written(study: Study, ranked: Ranked) -> list[list[str]]:
    """Return what each of the ten highest neurons of a ranking writes, by the sign that it has in the run."""
    return study.written(study.numbers(ranked.neurons[:DECODED]), ranked.signs[:DECODED])


def _hits(subject: Subject, found: Observations, method: str, unit: str, sets: Sequence[list[list[str]]]) -> None:
    """Observe the share of these sets of neurons that write the noun; of each set the tokens of its neurons."""
    facts = subject.facts
    decoded = [list(chain.from_iterable(tokens)) for tokens in sets]
    hits = {
        "exact_hit_rate": [exact_hit(tokens, facts.token) for tokens in decoded],
        "lemma_hit_rate": [lemma_hit(tokens, facts.concept, facts.token, facts.language) for tokens in decoded],
    }
    for measure, outcomes in hits.items():
        key = Key("sensitivity", measure, method, DECODED)
        found.add(key, facts.concept, unit, sum(outcomes) / len(outcomes))


def text_similarity(subject: Subject, found: Observations, encoder: Encoder) -> None:
    """Observe BERTScore of the written tokens to the noun, and that of another concept's neurons."""
    facts = subject.facts
    for method, ranked in (("score", facts.ranked["score"]), ("random pairing", facts.paired)):
        text = ", ".join(chain.from_iterable(_written(subject.study, ranked)))
        similar = encoder.match(text, facts.concept)
        found.add(Key("sensitivity", "bertscore", method, DECODED), facts.concept, facts.concept, similar)


class Clip:
    """A CLIP checkpoint of a local folder; nothing is fetched."""

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
        cosines = self.network(**inputs.to(self.network.device)).logits_per_image[:, 0] / self.network.logit_scale.exp()
        return [float(CLIP_WEIGHT * max(cosine, 0.0)) for cosine in cosines.tolist()]


def image_similarity(subject: Subject, found: Observations, clip: Clip) -> None:
    """Observe CLIPScore of the written tokens with the concept's images, and that of another concept's neurons."""
    facts, own = subject.facts, set(subject.own_samples)
    shown = [item.sample for item in subject.items if item.sample.sample_id in own]
    for method, ranked in (("score", facts.ranked["score"]), ("random pairing", facts.paired)):
        text = ", ".join(token for tokens in _written(subject.study, ranked) for token in tokens[:CLIP_TOKENS])
        key = Key("sensitivity", "clipscore", method, DECODED)
        for part in within_budget(shown, lambda sample: pixels_of(subject.model, sample.image), BUDGET):
            scores = clip.scores([decode_image(sample.image or b"", sample.background) for sample in part], text)
            found.extend(key, facts.concept, [sample.sample_id for sample in part], scores)


def invariance(subject: Subject, found: Observations) -> None:
    """Observe whether the same neurons are highest in other images."""
    concept, samples, own = subject.facts.concept, subject.own_samples, subject.own
    for size in INVARIANCE_SIZES:
        plain, elsewhere = (highest(subject.contributions[part], size) for part in (own, ~own))
        rows = {
            Key("image_invariance", "jaccard", "contribution", size): pairwise_jaccard(plain),
            Key("image_invariance", "jaccard", "other nouns", size): [
                sum(jaccard(one, other) for other in elsewhere) / len(elsewhere) for one in plain
            ],
        }
        for key, values in rows.items():
            found.extend(key, concept, samples, values)
        key = Key("image_invariance", "common_share", "contribution", size)
        found.add(key, concept, concept, common_share(plain))


def region_invariance(subject: Subject, found: Observations) -> None:
    """Observe whether the same neurons are highest with the patches permuted; nothing where there are none to permute.

    Where the decoder's sequence holds no image, the permutation would change nothing, and all be the same by itself.
    """
    if not subject.model.parts.image_in_sequence:
        return
    own = subject.own
    with permuted_image(subject.model, subject.batch):
        moved = torch.cat([part.cpu() for part in score_batch(subject.model, subject.batch, subject.places).scores], 1)
    for size in INVARIANCE_SIZES:
        plain, permuted, elsewhere = (
            highest(scores, size) for scores in (subject.contributions[own], moved[own], moved[~own])
        )
        rows = {
            Key("region_invariance", "overlap", "contribution", size): [
                overlap(one, other) for one, other in zip(plain, permuted, strict=True)
            ],
            Key("region_invariance", "overlap", "other images", size): [
                sum(overlap(one, other) for other in elsewhere) / len(elsewhere) for one in plain
            ],
        }
        for key, values in rows.items():
            found.extend(key, subject.facts.concept, subject.own_samples, values)


def specificity(subject: Subject, found: Observations) -> None:
    """Observe what the concept's neurons give to its noun and to others, and whether that tells them apart."""
    facts, study, own = subject.facts, subject.study, subject.own
    sets: dict[str, Neurons] = {name: facts.ranked[name].neurons[:DECODED] for name in RANKINGS}
    sets["layer-matched"] = controls.layer_matched(subject.model.widths, sets["score"], facts.concept)
    for method, neurons in sets.items():
        means = set_mean(subject.contributions, torch.tensor(study.numbers(neurons)))
        told, apart = placements(means[own], means[~own])
        rows = (
            ("auroc", subject.own_samples, told),
            ("own_score", subject.own_samples, means[own]),
            ("other_score", subject.other_samples, means[~own]),
        )
        for measure, samples, values in rows:
            found.extend(Key("specificity", measure, method, DECODED), facts.concept, samples, values.tolist())
        for sample_id, value in zip(subject.other_samples, apart.tolist(), strict=True):
            found.add(Key("specificity", "auroc", method, DECODED), facts.concept, sample_id, value, of=0.0)
