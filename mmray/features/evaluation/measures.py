"""The registry of measures: what each counts and by which protocol, its unit, and which direction is better.

Summaries, protocols and tables in the terminal derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mmray.features.evaluation.quality import bleu_value
from mmray.features.evaluation.settings import MeasureSettings
from mmray.objects.answers import Parser
from mmray.objects.pope_files import FILE
from mmray.objects.statistics import STRATEGIES, Adversarial, GroundTruth, Positives
from mmray.objects.words import COCO
from mmray.statistics.bootstrap import Value, ratio

Unit = Literal["share", "difference", "nats", "perplexity", "ratio", "words", "F1", "BLEU"]


@dataclass(frozen=True)
class Measure:
    """What a measure is; its name is its key in MEASURES."""

    protocol: str
    unit: Unit = "share"
    """A share lies between 0 and 1, and gets the interval of a share. A difference is between two shares."""
    better: Literal["higher", "lower", "neither"] = "higher"
    primary: bool = False
    """Every evaluation has it, with nulls if the data has no sample for it."""
    detail: bool = False
    """Shown by `--all` only."""
    of_objects: bool = False
    """Depends on which objects are in the image."""
    value: Value = ratio
    """From the totals over samples to the value."""


_SUCCESS = "greedy; of captions that had it, the unwanted word is gone and the target is named"
_SUCCESSES = {
    "reliability": Measure(f"images that the edit was made on: {_SUCCESS}", primary=True),
    "text_generality": Measure(
        f"paraphrased prompts, and the data's questions whose answer named it: {_SUCCESS}", primary=True
    ),
    "image_generality": Measure(f"images that the edit never saw: {_SUCCESS}", primary=True),
    "image_generality_flip": Measure(f"images mirrored: {_SUCCESS}"),
    "image_generality_crop": Measure(f"images cropped: {_SUCCESS}"),
    "text_generality_prompts": Measure(f"paraphrased prompts: {_SUCCESS}"),
    "text_generality_questions": Measure(f"the data's questions whose answer named it: {_SUCCESS}"),
    "language_generality": Measure(f"captions in languages other than the edit's: {_SUCCESS}"),
}
_FORCED = "teacher-forced along the caption with the words exchanged; "
_REWRITES = {
    f"{name}{end}": measure
    for name in ("reliability", "image_generality")
    for end, measure in {
        "_rest_unchanged": Measure(
            "greedy; all but the noun phrase of captions that had the word is unchanged, to the letter"
        ),
        "_exact": Measure("greedy; caption equal to the one before with the words exchanged, a and an agreeing"),
        "_teacher_forced": Measure(f"{_FORCED}every token and the end likeliest"),
        "_teacher_forced_token": Measure(f"{_FORCED}share of tokens, end included, likeliest", detail=True),
    }.items()
}


def _locality(name: str, texts: str, *, primary: bool = False, legacy: bool = True) -> dict[str, Measure]:
    """Return the measures of whether these texts stay as they are, each by another protocol.

    Those of MMEdit's code (`legacy`) need the states of all positions, the prompt's included.
    """
    along, by_code = f"{texts}: teacher-forced along the reply before; ", f"{texts}: legacy (MMEdit's code); "
    found = {
        name: Measure(f"{texts}: greedy; replies equal to the letter", primary=primary),
        f"{name}_span": Measure(
            f"{along}share of its positions, end included, with the same likeliest token", detail=True
        ),
        f"{name}_greedy_span": Measure(f"{texts}: greedy; share of positions with the same token", detail=True),
        f"{name}_kl": Measure(
            f"{along}mean KL(before ‖ after) of its positions, in nats; 0 is unchanged", unit="nats", better="lower"
        ),
    }
    if legacy:
        found |= {
            f"{name}_legacy": Measure(f"{by_code}ten likeliest tokens, rank by rank, over all positions"),
            f"{name}_legacy_top1": Measure(f"{by_code}likeliest token, over all positions", detail=True),
        }
    return found


def _mmedit() -> dict[str, Measure]:
    """Return the measures of MMEdit's records."""
    found: dict[str, Measure] = {}
    for name, fields in {
        "reliability": "src about image",
        "text_generality": "rephrase about image",
        "image_generality": "src about image_rephrase",
        "portability": "VLKEB's question that follows from the edit",
    }.items():
        what = f"MMEdit's records, {fields}: "
        along = f"{what}teacher-forced along the target; "
        found |= {
            f"mmedit_{name}": Measure(f"{what}greedy; the answer is the target, but for case and a full stop"),
            f"mmedit_{name}_exact": Measure(f"{along}every token likeliest (the trainer's exact match)"),
            f"mmedit_{name}_token": Measure(f"{along}share of tokens likeliest (the editor's accuracy)", detail=True),
        }
    for name, fields in {
        "image": "m_loc",
        "text": "loc",
        "random_image": "src about m_loc (De-VQA)",
        "no_image": "src without an image (De-VQA)",
        "consistent_image": "m_loc_q about image (De-VQA)",
    }.items():
        found |= _locality(f"mmedit_{name}_locality", f"MMEdit's records, {fields}")
    return found


def _exponential(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return e to the mean."""
    found: Float[ndarray, " draw"] = np.exp(ratio(totals))
    return found


REPLY_LENGTHS = (16, 64)
"""Text-only replies of up to so many tokens have a measure each; the last is where they are cut off."""
_PROMPTS = "general prompts without an image; interval over prompts: "
_PASSAGES = "plain text in several languages, each passage after its first sentence; interval over passages: "
_TEXT_ONLY = {
    **{
        f"text_only_{length}": Measure(
            f"{_PROMPTS}greedy; of replies of up to {length} tokens, those equal to the letter"
        )
        for length in REPLY_LENGTHS
    },
    "text_only_kl": Measure(
        f"{_PROMPTS}teacher-forced along the reply before; KL(before ‖ after), mean over all tokens and ends, in nats",
        unit="nats",
        better="lower",
    ),
    "perplexity": Measure(
        f"{_PASSAGES}teacher-forced; e to the mean negative log-likelihood per token",
        unit="perplexity",
        better="lower",
        value=_exponential,
    ),
    "perplexity_ratio": Measure(
        f"{_PASSAGES}teacher-forced; perplexity after over before; 1 is unchanged",
        unit="ratio",
        better="neither",
        value=_exponential,
    ),
}
"""Of held-out text."""

_named = partial(Measure, of_objects=True)
_wrongly_named = partial(Measure, of_objects=True, better="lower")

_POPE = {
    "accuracy": _named("right answers, of all"),
    "precision": _named("of the answers yes, those for present objects"),
    "recall": _named("of the present objects, those answered yes"),
    "f1": _named("harmonic mean of precision and recall"),
    "yes_ratio": _named("answers yes, of all", better="neither"),
    "unparsable": _wrongly_named("answers with neither yes nor no, of all", detail=True),
}
"""Figures of POPE, for each strategy of choosing absent objects."""
_ABSENT = {**{name: name for name in STRATEGIES}, FILE: "a file's"}
"""Strategy → how it is said."""

MEASURES: dict[str, Measure] = {
    **_SUCCESSES,
    **_locality("text_locality", "questions without an image", primary=True),
    **_locality("image_locality", "captions of images without the concept", primary=True),
    "hallucination": _wrongly_named("greedy; of samples with the context and without the word, captions that name it"),
    "chair_i": _wrongly_named(
        "greedy; mentions of objects that are not in the image, of all mentions (Rohrbach et al. 2018)",
        primary=True,
    ),
    "chair_s": _wrongly_named(
        "greedy; captions with a mention of an object that is not in the image (Rohrbach et al. 2018)",
        primary=True,
    ),
    "recall": Measure("greedy; objects of the image that the caption names", primary=True, of_objects=True),
    "companion_named": _named("greedy; of samples with the context and the word, captions that name it"),
    "confirmed": Measure("greedy; objects that captions name, in which the detector has a confidence of 0.5 or more"),
    "confirmed_new": Measure("greedy; objects that the caption names after the edit alone, confirmed by the detector"),
    "mean_length": Measure("greedy; words per caption", unit="words", better="neither"),
    "bleu": Measure("greedy; sacrebleu, corpus, 0 to 100, against the data's caption", unit="BLEU", value=bleu_value),
    "bertscore": Measure(
        "greedy; F1 of greedy matching to the data's caption, last layer of the encoder, no idf, not rescaled",
        unit="F1",
    ),
    **_TEXT_ONLY,
    **_REWRITES,
    **_locality(
        "image_locality_questions",
        "questions on images without the concept, the data's or, if an image has none, POPE's",
        legacy=False,
    ),
    **_locality("text_locality_about", "text questions naming an edited word"),
    **_mmedit(),
    **{
        f"pope_{strategy}_{figure}": replace(
            measure, protocol=f"greedy; POPE, {absent} absent objects (Li et al. 2023): {measure.protocol}"
        )
        for strategy, absent in _ABSENT.items()
        for figure, measure in _POPE.items()
    },
    "pope_yes_ratio": _named("greedy; POPE, all strategies together: answers yes, of all", better="neither"),
    "pope_yes_ratio_change": _named(
        "greedy; POPE, all strategies together: share of answers yes, after minus before, paired by image",
        unit="difference",
        better="neither",
    ),
}
"""By name. The measure of a single pair or purpose has that name, a colon, and the pair."""

# Their order here is the order in evaluation.json and in the terminal.
PRIMARY = tuple(name for name, measure in MEASURES.items() if measure.primary)

_PRESENT: Mapping[GroundTruth, str] = {
    "instances": "what is annotated",
    "captions": "what its captions in the data name",
    "union": "what is annotated or its captions in the data name",
}
_PARSERS: Mapping[Parser, str] = {
    "sentences": "the first sentence that says yes or no, denies or affirms is the answer",
    "released": "no where the first sentence has No, no or not, else yes (released parser)",
}
_POSITIVES: Mapping[Positives, str] = {
    "drawn": "present objects drawn",
    "first": "an image's first objects, of images that have enough",
}
_ADVERSARIAL: Mapping[Adversarial, str] = {
    "object": "most often with the object asked about",
    "image": "most often with all objects of the image",
}


def measure_of(name: str) -> Measure:
    """Return the measure of this name; that of a pair or purpose is the measure before the colon."""
    return MEASURES[name.partition(":")[0]]


def protocol_of(name: str, settings: MeasureSettings) -> str:
    """Return how a measure is measured under these settings."""
    measure, parts = measure_of(name), [measure_of(name).protocol]
    pope = name.startswith("pope_")
    if pope and settings.pope:
        return "; ".join([*parts, _PARSERS[settings.pope_parser], "released questions and labels"])
    if pope:
        parts += [_PARSERS[settings.pope_parser], _POSITIVES[settings.pope_positives]]
        parts += [_ADVERSARIAL[settings.pope_adversarial]] if name.startswith("pope_adversarial") else []
    if measure.of_objects and settings.ground_truth is not None:
        parts.append(f"in the image: {_PRESENT[settings.ground_truth]}")
    if measure.of_objects and not pope and settings.synonyms == COCO:
        parts.append("COCO's 80 objects and their synonyms, with CHAIR's rules")
    return "; ".join(parts)
