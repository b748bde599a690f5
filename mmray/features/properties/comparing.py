"""Methods of finding neurons, compared on the same images: what their highest write, and what zeroing those does."""

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
"""Scores by which neurons are ranked; `folded` has the final norm in it, `specific` subtracts what others get.

Without an image in the decoder's sequence there is no `gradient`, which sums over its positions; without gates that can
be read there is no `gate`.
"""


def compare_methods(subject: Subject, effects: AblationEffects, found: Observations) -> None:
    """Observe every method's neurons."""
    facts, study = subject.facts, subject.study
    model = subject.model
    missing = {
        "gradient": not model.parts.image_in_sequence,
        "gate": not has_gates(model.network, model.projections),
    }
    for method in METHODS:
        if missing.get(method):
            continue
        scores, order = ranked_by(subject, method)
        numbers = order.topk(min(MOST, len(order))).indices.tolist()
        neurons = study.names(numbers)
        falls = effects.falls(neurons, ablate(subject.model, neurons))[0]
        tokens = chain.from_iterable(subject.written_here(numbers[:DECODED]))
        hit = lemma_hit(tokens, facts.concept, facts.token, facts.language)
        found.add(Key("comparison", "lemma_hit_rate", method, DECODED), facts.concept, facts.concept, hit)
        rows = (
            ("zeroed_own", MOST, subject.own_samples, falls[subject.own].tolist()),
            ("zeroed_other", MOST, subject.other_samples, falls[~subject.own].tolist()),
            ("jaccard", DECODED, subject.own_samples, pairwise_jaccard(highest(scores, DECODED))),
        )
        for measure, size, samples, values in rows:
            found.extend(Key("comparison", measure, method, size), facts.concept, samples, values)


def ranked_by(subject: Subject, method: str) -> tuple[Float[Tensor, "own neuron"], Float[Tensor, " neuron"]]:
    """Return a method's scores at the concept's places, and what it orders neurons by."""
    own = subject.own
    if method == "specific":
        scores = subject.contributions
        return scores[own], specific_order(scores, own)
    if method == "gradient":
        # A backward pass costs most: it runs over the concept's images alone.
        alone = subject.study.encoded(
            [item.sample for item in subject.items if item.sample.sample_id in set(subject.own_samples)]
        )
        assert alone is not None
        own_subject = Subject(subject.study, subject.facts, *alone)
        found = score_batch(subject.model, own_subject.batch, own_subject.places, "gradient")
        scores = torch.cat([part.cpu() for part in found.scores], dim=1)
        return scores, scores.mean(dim=0)
    folded = method == "folded"
    scores = subject.scores("contribution" if folded else method, folded=folded)[own]
    return scores, scores.mean(dim=0)
