"""What each measure is: the words that go with its number."""

from __future__ import annotations

from mmray.features.evaluation.quality import bleu_value
from mmray.features.evaluation.settings import MeasureSettings
from mmray.objects.answers import Parser
from mmray.objects.statistics import Adversarial, GroundTruth, Positives
from mmray.objects.words import COCO
from mmray.statistics.bootstrap import Value, ratio

PRIMARY = (
    "reliability",
    "text_generality",
    "image_generality",
    "text_locality",
    "image_locality",
    "chair_i",
    "chair_s",
    "recall",
)
"""Measures that every evaluation has, with nulls where the data has no such sample."""

SUCCESS = "greedy; of captions that had it, the word to go is gone and the target named"
AS_BEFORE = {
    "": "greedy; replies equal to the letter",
    "_span": "teacher-forced along the reply before; share of its places, end included, with the same likeliest token",
    "_greedy_span": "greedy; share of places with the same token",
    "_kl": "teacher-forced along the reply before; mean KL(before ‖ after) of its places, in nats; 0 is unchanged",
    "_legacy": "legacy (MMEdit's code); ten likeliest tokens, rank by rank, over all positions",
    "_legacy_top1": "legacy (MMEdit's code); likeliest token, over all positions",
}
"""Ending of a measure of locality → how it is measured."""
UNRELATED = "images without the concept"
POPE = {
    "accuracy": "right answers, of all",
    "precision": "of the answers yes, those for present objects",
    "recall": "of the present objects, those answered yes",
    "f1": "harmonic mean of precision and recall",
    "yes_ratio": "answers yes, of all",
    "unparsable": "answers with neither yes nor no, of all",
}
REST = "greedy; all but the noun phrase of captions that had the word is unchanged, to the letter"
EXACT = "greedy; caption equal to the one before with the words exchanged, a and an agreeing"
FORCED = "teacher-forced along the caption with the words exchanged; every token and the end likeliest"
FORCED_TOKEN = "teacher-forced along the caption with the words exchanged; share of tokens, end included, likeliest"
MMEDIT = "MMEdit's records, "
REWRITES = {
    "reliability": "src about image",
    "text_generality": "rephrase about image",
    "image_generality": "src about image_rephrase",
}
REWRITE = "greedy; the answer is alt, but for case and a full stop"
REWRITE_EXACT = "teacher-forced along alt; every token likeliest (the trainer's exact match)"
REWRITE_TOKEN = "teacher-forced along alt; share of tokens likeliest (the editor's accuracy)"

PROTOCOLS: dict[str, str] = {
    "reliability": f"images that the edit was made on: {SUCCESS}",
    "image_generality": f"images that the edit never saw: {SUCCESS}",
    "image_generality_flip": f"images mirrored: {SUCCESS}",
    "image_generality_crop": f"images cropped: {SUCCESS}",
    "text_generality": f"paraphrased prompts, and the data's questions whose answer named it: {SUCCESS}",
    "text_generality_prompts": f"paraphrased prompts: {SUCCESS}",
    "text_generality_questions": f"the data's questions whose answer named it: {SUCCESS}",
    "language_generality": f"captions in languages other than the edit's: {SUCCESS}",
    "hallucination": "greedy; of samples with the context and without the word, captions that name it",
    "companion_named": "greedy; of samples with the context and the word, captions that name it",
    "chair_i": "greedy; mentions of objects that are not in the image, of all mentions (Rohrbach et al. 2018)",
    "chair_s": "greedy; captions with a mention of an object that is not in the image (Rohrbach et al. 2018)",
    "recall": "greedy; objects of the image that the caption names",
    "confirmed": "greedy; objects that captions name, in which the detector has a confidence of 0.5 or more",
    "confirmed_new": "greedy; objects that the caption names after the edit alone, confirmed by the detector",
    "mean_length": "greedy; words a caption",
    "bleu": "greedy; sacrebleu, corpus, 0 to 100, against the data's caption",
    "bertscore": "greedy; F1 of greedy matching to the data's caption, last layer of the encoder, no idf, not rescaled",
    **{f"{name}_rest_unchanged": REST for name in ("reliability", "image_generality")},
    **{f"{name}_exact": EXACT for name in ("reliability", "image_generality")},
    **{f"{name}_teacher_forced": FORCED for name in ("reliability", "image_generality")},
    **{f"{name}_teacher_forced_token": FORCED_TOKEN for name in ("reliability", "image_generality")},
    **{f"image_locality{end}": f"captions of {UNRELATED}: {how}" for end, how in AS_BEFORE.items()},
    **{f"image_locality_questions{end}": f"questions on {UNRELATED}: {how}" for end, how in AS_BEFORE.items()},
    **{f"text_locality{end}": f"questions without an image: {how}" for end, how in AS_BEFORE.items()},
    **{f"text_locality_about{end}": f"text questions naming an edited word: {how}" for end, how in AS_BEFORE.items()},
    **{f"mmedit_{name}": f"{MMEDIT}{what}: {REWRITE}" for name, what in REWRITES.items()},
    **{f"mmedit_{name}_exact": f"{MMEDIT}{what}: {REWRITE_EXACT}" for name, what in REWRITES.items()},
    **{f"mmedit_{name}_token": f"{MMEDIT}{what}: {REWRITE_TOKEN}" for name, what in REWRITES.items()},
    **{f"mmedit_image_locality{end}": f"{MMEDIT}m_loc: {how}" for end, how in AS_BEFORE.items()},
    **{f"mmedit_text_locality{end}": f"{MMEDIT}loc: {how}" for end, how in AS_BEFORE.items()},
    **{
        f"pope_{strategy}_{figure}": f"greedy; POPE, {strategy} absent objects (Li et al. 2023): {what}"
        for strategy in ("random", "popular", "adversarial")
        for figure, what in POPE.items()
    },
}
"""Measure → how it is measured; those of single pairs have the pair behind a colon."""

MEANS = ("mean_length", "bertscore")
"""Measures that are means of numbers of any size; so are divergences, whose names end in `_kl`."""
OBJECTS = ("chair_i", "chair_s", "recall", "hallucination", "companion_named")
"""Measures of which objects are in the image, other than POPE's."""
THERE: dict[GroundTruth, str] = {
    "instances": "what is annotated",
    "captions": "what its captions in the data name",
    "union": "what is annotated or its captions in the data name",
}
PARSERS: dict[Parser, str] = {
    "sentences": "the first sentence that says yes or no, denies or affirms is the answer",
    "released": "no where the first sentence has No, no or not, else yes (released parser)",
}
POSITIVES: dict[Positives, str] = {
    "drawn": "present objects drawn",
    "first": "an image's first objects, of images that have enough",
}
ADVERSARIAL: dict[Adversarial, str] = {
    "object": "most often with the object asked for",
    "image": "most often with all objects of the image",
}

VALUES: dict[str, Value] = {"bleu": bleu_value}
"""Measures that are not a share: from totals to the value."""


def protocol_of(measure: str, settings: MeasureSettings) -> str:
    """Return how a measure is measured."""
    name = measure.partition(":")[0]
    said = [PROTOCOLS[name]]
    if name.startswith("pope_"):
        said += [PARSERS[settings.pope_parser], POSITIVES[settings.pope_positives]]
        said += [ADVERSARIAL[settings.pope_adversarial]] if name.startswith("pope_adversarial") else []
    if name.startswith(("pope_", *OBJECTS)) and settings.ground_truth is not None:
        said.append(f"in the image: {THERE[settings.ground_truth]}")
    if name in OBJECTS and settings.synonyms == COCO:
        said.append("COCO's 80 objects and their synonyms, with CHAIR's rules")
    return "; ".join(said)


def value_of(measure: str) -> Value:
    """Return what makes a measure of its totals."""
    return VALUES.get(measure, ratio)


def is_share(measure: str) -> bool:
    """Return whether a measure lies between 0 and 1, so that its interval is that of a share."""
    return measure not in VALUES and measure not in MEANS and not measure.endswith("_kl")
