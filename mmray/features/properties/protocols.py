"""The protocol of each measure of a property: how it is measured, in words for the table and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mmray.statistics.bootstrap import Value, ratio

if TYPE_CHECKING:
    from mmray.features.properties.observations import Key

FORCED = "teacher-forced along the caption; mean over images of"
OTHERS = "the nouns of images without the concept"
HITS = "of concepts; `image`: of images, each with its own ten highest"
WRITTEN = "the ten tokens that one of the neurons writes (where its activation is negative, those its row suppresses)"
GREEDY = "greedy captions before and after;"

PROTOCOLS = {
    "exact_hit_rate": f"the noun's scored token is among {WRITTEN}; {HITS}",
    "lemma_hit_rate": f"a form of the noun, or its scored token, is among {WRITTEN}; {HITS}",
    "inference_score": "fraction of the ten highest neurons that write the noun: a form of it, or its scored token, is "
    "among the neuron's ten tokens; this definition is ours, because the paper's could not be read",
    "moverscore": "1 − earth mover's distance from the ten highest neurons' tokens, ten each, to the noun; tokens of "
    "the encoder's last layer, all of one weight (Zhao et al. 2019, without n-grams and idf)",
    "bertscore": "F1 of greedy matching of the ten highest neurons' tokens, ten each, to the noun; last layer of the "
    "encoder, no idf, not rescaled (Zhang et al. 2020)",
    "clipscore": "2.5 · max(cos, 0) of the image and the ten highest neurons' first tokens (Hessel et al. 2021)",
    "overlap": "image tokens permuted after the projector, the caption unchanged; |T ∩ T'| / n of the image's n "
    "highest neurons at the noun (Pan et al. 2024); control: T' of another image's noun",
    "overlap_regenerated": "image tokens permuted after the projector, and a new greedy caption; |T ∩ T'| / n of the "
    "n highest neurons at the noun in both captions, if both name it (Pan et al. 2024); control: T' of another image's "
    "noun, in the run's caption",
    "regenerated_named": "fraction of the concept's images whose greedy caption names it with image tokens permuted",
    "common_share": "neurons among the n highest at the noun in every image of the concept, as a fraction of n",
    "jaccard": "mean Jaccard index of the n highest neurons at the noun in two images of the concept; control: with "
    "images of other nouns",
    "auroc": "mean contribution of the neurons to the correct noun: its positions compared with those of other nouns; "
    "the interval is over images of both sides; n counts all of them",
    "own_score": "mean contribution of the neurons to the concept's noun at its positions, in logits",
    "other_score": "mean contribution of the neurons to other nouns at their positions, in logits",
    "p_untouched": f"{FORCED} the probability of the noun's scored token",
    "zeroed_own": f"{FORCED} the fall of the noun's probability when the neurons are zeroed at all positions",
    "zeroed_other": f"{FORCED} the fall of the probability, when they are zeroed, of {OTHERS}",
    "zeroed_removed": f"{GREEDY} the fraction of those naming the concept that no longer do",
    "zeroed_kept": f"{GREEDY} the fraction of those of images without the concept that are identical",
    "zeroed_perplexity": "perplexity of the whole captions of images without the concept, after / before",
    "noise_own": f"{FORCED} the fall of the noun's probability with Gaussian noise on the neurons' rows; strength: "
    "σ as a fraction of the rows' root mean square (Pan et al. 2024)",
    "noise_other": f"{FORCED} the fall of the probability, with that noise, of {OTHERS}",
    "noise_removed": f"noise on the rows; {GREEDY} the fraction of those naming the concept that no longer do",
    "noise_kept": f"noise on the rows; {GREEDY} the fraction of those of images without the concept that are identical",
    "amplified_own": f"{FORCED} the rise of the probability of the concept's token at the positions of other nouns "
    "when the neurons' activations are multiplied; strength: the factor",
    "amplified_other": f"{FORCED} the fall of the probability, when they are multiplied, of {OTHERS}",
    "pointing_game": "images of several objects with boxes: the highest point of the map lies in the object's box; the "
    "map is the mean of the neurons' activations, each with its sign at the noun, bilinear; “unsigned”: without signs; "
    "“gate”: of the same neurons' gates after their non-linearity, which the authors' released code reads; chance: "
    "the area of the box as a fraction of the image",
    "iou": "images of several objects with boxes: IoU of the map above its 95th percentile with the object's box",
}
"""Protocol of each measure. In-sample measures, and methods compared on held-out images, get a prefix; see
`protocol_of`."""

HALVES = "ranked on half of the concept's images and measured on the other half, both ways; "
IN_SAMPLE = "in-sample, measured on images that ranked the neurons; "
HELD_OUT = "held-out, measured on images that did not rank the neurons; "
RANKED = ("sensitivity", "specificity", "causal", "localisation")
"""Properties of neurons that the run's rankings name."""
PER_IMAGE = ("jaccard", "common_share", "overlap", "overlap_regenerated")
"""Measures of each image's own highest neurons."""
UNRANKED = ("layer-matched", "activation-matched", "uniform", "image", "random pairing", "none", "chance")
"""Methods of these properties that use no ranking: controls, and each image's own highest neurons."""


def protocol_of(key: Key, *, held_out: bool = False) -> str:
    """Return the protocol of a measure; `held_out`: its images did not rank the neurons."""
    if key.property == "comparison":
        return (HALVES if key.measure not in PER_IMAGE else "") + PROTOCOLS[key.measure]
    # Controls were not chosen by the images, so measuring them there is no bias.
    ranked = key.property in RANKED and key.method not in UNRANKED
    return ((HELD_OUT if held_out else IN_SAMPLE) if ranked else "") + PROTOCOLS[key.measure]


def perplexity_ratio(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return exp of the mean change of the negative log-probability per token."""
    # The observations are falls of log-probability in nats, so their mean is the change of the cross-entropy.
    ratios: Float[ndarray, " draw"] = np.exp(ratio(totals))
    return ratios


SHARES = frozenset(
    {
        "exact_hit_rate",
        "lemma_hit_rate",
        "inference_score",
        "overlap",
        "overlap_regenerated",
        "regenerated_named",
        "common_share",
        "jaccard",
        "auroc",
        "zeroed_removed",
        "zeroed_kept",
        "noise_removed",
        "noise_kept",
        "pointing_game",
        "iou",
    }
)
"""Measures that are fractions and have the intervals of `share_interval`."""

VALUES: dict[str, Value] = {"zeroed_perplexity": perplexity_ratio}
"""Functions from totals to the value, for measures that are not a mean."""
