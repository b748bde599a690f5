"""Methods of finding neurons, compared on the same images by the tokens written and the effect of zeroing."""

from __future__ import annotations

from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.properties.effects import AblationEffects
from mmray.features.properties.measures import highest, lemma_hit, pairwise_jaccard, specific_order
from mmray.features.properties.observations import Key, Observations
from mmray.features.properties.settings import DECODED, MOST
from mmray.features.properties.subject import Subject
from mmray.models.capture import has_gates
from mmray.models.interventions import ablate
from mmray.neurons.scoring import score_batch

METHODS = ("contribution", "folded", "specific", "gate", "activation", "gradient", "random")
"""Scores that rank the neurons. `folded` includes the final norm; `specific` subtracts the contribution elsewhere.

There is no `gradient` if the decoder's sequence holds no image, because it sums over the image's positions. There is no
`gate` if the model's gates can't be read.
"""


def compare_methods(subject: Subject, effects: AblationEffects, found: Observations) -> None:
    """Measure the neurons of every method."""
    inputs, study = subject.inputs, subject.study
    model = subject.model
    # Methods that this family can't have are left out, not measured as zero.
    missing = {
        "gradient": not model.parts.image_in_sequence,
        "gate": not has_gates(model.network, model.projections),
    }
    for method in METHODS:
        if missing.get(method):
            continue
        # Ranked on the very images that are measured, so that no method profits from more data.
        scores, order = scores_and_order(subject, method)
        indices = order.topk(min(MOST, len(order))).indices.tolist()
        neurons = study.locate(indices)
        falls = effects.falls(neurons, ablate(subject.model, neurons))[0]
        tokens = chain.from_iterable(subject.written_here(indices[:DECODED]))
        hit = lemma_hit(tokens, inputs.concept, inputs.token, inputs.language)
        found.add(Key("comparison", "lemma_hit_rate", method, DECODED), inputs.concept, inputs.concept, hit)
        rows = (
            ("zeroed_own", MOST, subject.own_samples, falls[subject.own].tolist()),
            ("zeroed_other", MOST, subject.other_samples, falls[~subject.own].tolist()),
            ("jaccard", DECODED, subject.own_samples, pairwise_jaccard(highest(scores, DECODED))),
        )
        for measure, size, samples, values in rows:
            found.extend(Key("comparison", measure, method, size), inputs.concept, samples, values)


def scores_and_order(subject: Subject, method: str) -> tuple[Float[Tensor, "own neuron"], Float[Tensor, " neuron"]]:
    """Return a method's scores at the concept's positions, and the values by which it ranks neurons."""
    own = subject.own
    if method == "specific":
        scores = subject.contributions
        return scores[own], specific_order(scores, own)
    if method == "gradient":
        # The backward pass is expensive, so it runs on the concept's own images only.
        own_images = subject.study.encoded(
            [item.sample for item in subject.items if item.sample.sample_id in set(subject.own_samples)]
        )
        assert own_images is not None
        own_subject = Subject(subject.study, subject.inputs, *own_images)
        found = score_batch(subject.model, own_subject.batch, own_subject.positions, "gradient")
        scores = torch.cat([part.cpu() for part in found.scores], dim=1)
        return scores, scores.mean(dim=0)
    folded = method == "folded"
    scores = subject.scores("contribution" if folded else method, folded=folded)[own]
    return scores, scores.mean(dim=0)
