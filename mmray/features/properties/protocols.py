"""What each measure of a property is: the words that go with its number."""

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
    "bertscore": "F1 of greedy matching of the ten highest neurons' tokens, ten each, to the noun; last layer of the "
    "encoder, no idf, not rescaled (Zhang et al. 2020)",
    "clipscore": "2.5 · max(cos, 0) of the image and the ten highest neurons' first tokens (Hessel et al. 2021)",
    "overlap": "image tokens permuted behind the projector, the caption as it was; |T ∩ T'| / n of the image's n "
    "highest neurons at the noun (Pan et al. 2024); control: T' of another image's noun",
    "common_share": "neurons among the n highest at the noun in every image of the concept, of n",
    "jaccard": "mean Jaccard index of the n highest neurons at the noun in two images of the concept; control: with "
    "images of other nouns",
    "auroc": "mean contribution of the neurons to the noun that is due: its places against those of other nouns; the "
    "interval is over images of both sides, which are all counted",
    "own_score": "mean contribution of the neurons to the concept's noun at its places, in logits",
    "other_score": "mean contribution of the neurons to other nouns at theirs, in logits",
    "p_untouched": f"{FORCED} the probability of the noun's scored token",
    "zeroed_own": f"{FORCED} by how much zeroing the neurons at all positions lowers the noun's probability",
    "zeroed_other": f"{FORCED} by how much zeroing them lowers the probability of {OTHERS}",
    "zeroed_removed": f"{GREEDY} of those that named the concept, those that do no longer",
    "zeroed_kept": f"{GREEDY} of images without the concept, those that are unchanged to the letter",
    "zeroed_perplexity": "perplexity of the whole captions of images without the concept, after / before",
    "noise_own": f"{FORCED} by how much Gaussian noise on the neurons' rows lowers the noun's probability; strength: "
    "σ in parts of the rows' root mean square (Pan et al. 2024)",
    "noise_other": f"{FORCED} by how much that noise lowers the probability of {OTHERS}",
    "noise_removed": f"noise on the rows; {GREEDY} of those that named the concept, those that do no longer",
    "noise_kept": f"noise on the rows; {GREEDY} of images without the concept, those that are unchanged to the letter",
    "amplified_own": f"{FORCED} by how much multiplying the neurons' activations raises the probability of the "
    "concept's token at the places of other nouns; strength: the factor",
    "amplified_other": f"{FORCED} by how much that lowers the probability of {OTHERS}",
    "pointing_game": "images of several objects with boxes: the highest point of the map lies in the object's box; the "
    "map is the mean of the neurons' activations, each with the sign that it has at the noun, bilinear; "
    "“unsigned”: without signs; “gate”: of the same neurons' gates after their non-linearity, which the authors' "
    "released code reads; chance: the part of the image that the box takes",
    "iou": "images of several objects with boxes: IoU of the map above its 95th percentile with the object's box",
}
"""Measure → how it is measured."""

COMPARISON = "ranked and measured on the same images; "
IN_SAMPLE = "in-sample, measured on images that ranked the neurons; "
RANKED = ("sensitivity", "specificity", "causal", "localisation")
"""Properties whose neurons the run's rankings name."""
UNRANKED = ("layer-matched", "activation-matched", "uniform", "image", "random pairing", "none", "chance")
"""Methods of these properties whose neurons no ranking names: controls, and each image's own highest."""


def protocol_of(key: Key) -> str:
    """Return how a measure is measured."""
    if key.property == "comparison":
        return COMPARISON + PROTOCOLS[key.measure]
    ranked = key.property in RANKED and key.method not in UNRANKED
    return (IN_SAMPLE if ranked else "") + PROTOCOLS[key.measure]


def perplexity_ratio(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    """Return exp of the mean change of the negative log-probability a token."""
    ratios: Float[ndarray, " draw"] = np.exp(ratio(totals))
    return ratios


SHARES = frozenset(
    {
        "exact_hit_rate",
        "lemma_hit_rate",
        "overlap",
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
"""Measures between 0 and 1, whose intervals are those of shares."""

VALUES: dict[str, Value] = {"zeroed_perplexity": perplexity_ratio}
"""Measures that are not a mean: from totals to the value."""


def value_of(measure: str) -> Value:
    """Return what makes a measure of its totals."""
    return VALUES.get(measure, ratio)
