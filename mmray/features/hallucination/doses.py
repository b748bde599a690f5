"""Interventions on the probe's neurons while captions are written: dose and response of hallucination and its price.

A condition changes neurons at the positions that predict tokens of a caption or an answer; plain text is read with the
change at every position. Decodings change no neuron, but how tokens are chosen. Every test image meets every condition,
so that differences are paired.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.errors import InputError
from mmray.features.hallucination.claims import ANSWER
from mmray.features.hallucination.doubt import without_doubted
from mmray.features.hallucination.mentions import MentionReader, WrittenCaption
from mmray.features.hallucination.neuron_tables import PARTS
from mmray.models.decodings import GREEDY, Decoding, decoding_of
from mmray.models.generation import generate
from mmray.models.interventions import scale, set_to
from mmray.models.norms import log_probability
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.activation_cache import cache_activations, forward
from mmray.neurons.token_positions import TokenPosition
from mmray.objects.answers import says_yes
from mmray.objects.lexicon import objects_of
from mmray.objects.prompts import presence
from mmray.objects.statistics import STRATEGIES, choose_pope_objects
from mmray.statistics.bootstrap import Value, measure, ratio, totals_by_image

WORDS = re.compile(r"\w+(?:[-'’]\w+)*")
SCALE, TRUE_MEAN, DOUBT = "scale", "true mean", "ban below"
MEASURES = {
    "chair_i": "mentions of absent objects, of all mentions",
    "chair_s": "captions with such a mention, of all captions",
    "recall": "objects that captions name, of those in the image",
    "length": "words per caption",
    "pope_accuracy": "answers about present and absent objects that are right, of all",
    "pope_yes": "answers that say yes, of all",
    "pope_f1": "F1 of yes: twice the right yes, of all yes and all questions about present objects",
    "perplexity": "of the data's captions, read without their image",
}
"""What is measured under each condition."""
COMPARED = ("chair_i", "chair_s", "recall", "length", "perplexity")
"""Measures whose ratio to the unchanged model's is a row, too."""
SHARES = ("chair_s", "chair_i", "recall", "pope_accuracy", "pope_yes")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Condition:
    """An intervention."""

    neurons: str
    """Whose: none, raised, lowered, probe, or random like one of them."""
    change: str | None
    """SCALE, TRUE_MEAN, the name of a decoding, whose strength is the dose, or DOUBT, whose probability is; DOUBT may
    come after a decoding."""
    dose: float | None
    names: tuple[str, ...]
    values: tuple[float, ...] = ()
    """With TRUE_MEAN: what each neuron is set to."""
    decoding: Decoding = GREEDY
    """How tokens are chosen."""
    below: float | None = None
    """Captions are written again without what is less likely than this."""


def conditions(
    rows: Sequence[Mapping[str, Any]],
    controls: Sequence[str],
    control_means: Sequence[float],
    doses: Sequence[float],
    decodings: Sequence[Decoding] = (),
    doubts: Sequence[tuple[float, Decoding]] = (),
) -> list[Condition]:
    """Return the interventions, given the table `hallucination_neurons` and a random neuron of the layer for each.

    raised: neurons with a positive weight, whose share is higher at hallucinated mentions; lowered: the others.
    Decodings come last, and captions without what is less likely than each of the probabilities of `doubts`, written by
    the decoding that comes with it.
    """
    names = [row["neuron"] for row in rows]
    raised = [row["weight"] > 0 for row in rows]
    found = [Condition("none", None, None, ())]
    for label, side in (("raised", True), ("lowered", False)):
        # A layer with few other neurons has fewer controls than neurons, so the list of controls may be shorter.
        own = [number for number, one in enumerate(raised) if one == side]
        for kind, pool in ((label, names), (f"random like {label}", controls)):
            chosen = tuple(pool[number] for number in own if number < len(pool))
            found += [Condition(kind, SCALE, dose, chosen) for dose in doses if chosen]
    means = tuple(row["true_activation"] for row in rows)
    found.append(Condition("probe", TRUE_MEAN, None, tuple(names), means))
    found.append(Condition("random like probe", TRUE_MEAN, None, tuple(controls), tuple(control_means)))
    found += [Condition("none", one.name, one.strength, (), decoding=one) for one in decodings]
    for probability, one in doubts:
        change = DOUBT if one.plain else f"{one}, {DOUBT}"
        found.append(Condition("none", change, probability, (), decoding=one, below=probability))
    return found


def doubt_of(given: str) -> tuple[float, Decoding]:
    """Return the probability and the decoding that P or P:DECODING stands for.

    Raises InputError for a probability that is not above 0 and at most 1, or an unknown decoding.
    """
    probability, _, name = given.partition(":")
    try:
        value = float(probability)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise InputError(f"--ban-below {given}: give a probability above 0 and at most 1, such as 0.3 or 0.3:average")
    return value, decoding_of(name) if name else GREEDY


def observe(
    reader: MentionReader, pairs: Sequence[tuple[Sample, Image]], every: Sequence[Condition], questions: int
) -> pa.Table:
    """Return the rows of the part `dosed` for samples whose objects are known."""
    rows: Rows = []
    for number, condition in enumerate(every):
        for sample, name, sums in _measured(reader, pairs, condition, questions):
            rows.append(
                {"condition": number, "sample_id": sample.sample_id, "image": sample.image_key}
                | {"measure": name, "sums": [float(one) for one in sums]}
            )
    return pa.Table.from_pylist(rows, PARTS["dosed"])


def dose_rows(observed: pa.Table, every: Sequence[Condition], draws: int, seed: int) -> Rows:
    """Return the rows of the table `hallucination_doses`."""
    grouped: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in observed.to_pylist():
        grouped.setdefault((row["condition"], row["measure"]), []).append(row)
    rows: Rows = []
    for number, condition in enumerate(every):
        facts = asdict(condition) | {"count": len(condition.names)}
        for name, protocol in MEASURES.items():
            if (number, name) not in grouped:
                continue
            totals = _totals(grouped[number, name])
            value = _perplexity if name == "perplexity" else ratio
            found = measure(totals, totals, value, draws, seed, share=name in SHARES)
            own = {"measure": name, "value": found.after, "low": found.low, "high": found.high, "n": found.n}
            rows.append(facts | own | {"protocol": protocol})
            # A ratio of the unchanged model, which is condition 0, to itself says nothing.
            if number and name in COMPARED:
                # Side by side, so that the bootstrap draws an image under both conditions together. A dose may make
                # a text's nats infinite, so that its image is in one of them alone.
                sides = [grouped[number, name], grouped[0, name]]
                shared = set.intersection(*({row["image"] for row in side} for side in sides))
                if not shared:
                    continue
                both = np.concatenate([_totals([row for row in s if row["image"] in shared]) for s in sides], axis=1)
                found = measure(both, both, partial(_relative, value), draws, seed)
                own = {"measure": f"{name} relative", "value": found.after, "low": found.low, "high": found.high}
                rows.append(facts | own | {"n": found.n, "protocol": f"{protocol}: over that of the unchanged model"})
    return rows


def _totals(rows: Sequence[Mapping[str, Any]]) -> Float[ndarray, "image sum"]:
    sums = np.array([row["sums"] for row in rows], dtype=float)
    return totals_by_image([row["image"] for row in rows], *sums.T)


def _perplexity(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    found: Float[ndarray, " draw"] = np.exp(ratio(totals))
    return found


def _relative(value: Value, totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    after, before = value(totals[:, :2]), value(totals[:, 2:])
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Float[ndarray, " draw"] = np.where(before > 0, after / before, np.nan)
    return found


def _changed(reader: MentionReader, condition: Condition, *, last: bool) -> AbstractContextManager[None]:
    if not condition.names:
        return nullcontext()
    if condition.change == TRUE_MEAN:
        return set_to(reader.model, condition.names, condition.values, last=last)
    assert condition.dose is not None
    return scale(reader.model, condition.names, condition.dose, last=last)


def _measured(
    reader: MentionReader, pairs: Sequence[tuple[Sample, Image]], condition: Condition, questions: int
) -> Iterator[tuple[Sample, str, Sequence[float]]]:
    """Yield, per sample and measure, what it adds up."""
    if condition.below is not None:
        # Neither answers nor plain text name objects that could be banned.
        yield from _of_captions(without_doubted(reader, pairs, condition.below, condition.decoding))
        return
    # At the last position of each forward alone, where a token is predicted: the image is read unchanged.
    with _changed(reader, condition, last=True):
        captions = reader.captions(pairs, condition.decoding)
        answers = list(_answers(reader, pairs, questions, condition.decoding))
    yield from _of_captions(captions)
    yield from answers
    if not condition.decoding.plain:
        # Decodings are about images: a text without one is read by the model as it is.
        return
    # A text is read in one forward, in which every position predicts a token.
    with _changed(reader, condition, last=False):
        yield from _read(reader, [sample for sample, _ in pairs if sample.caption])


def _of_captions(captions: Sequence[WrittenCaption]) -> Iterator[tuple[Sample, str, Sequence[float]]]:
    """Yield what captions add up of CHAIR, recall and length."""
    for caption in captions:
        named = [mention.concept for mention in caption.mentions]
        wrong = sum(concept not in caption.objects for concept in named)
        yield caption.sample, "chair_i", (wrong, len(named))
        yield caption.sample, "chair_s", (wrong > 0, 1)
        yield caption.sample, "recall", (len(caption.objects.intersection(named)), len(caption.objects))
        yield caption.sample, "length", (len(WORDS.findall(caption.text)), 1)


def _answers(
    reader: MentionReader, pairs: Sequence[tuple[Sample, Image]], questions: int, decoding: Decoding
) -> Iterator[tuple[Sample, str, Sequence[float]]]:
    """Ask whether present and absent objects are in the image, as POPE does (Li et al. 2023)."""
    asked = []
    for sample, image in pairs if questions else ():
        objects, seed = objects_of(sample) or frozenset(), f"{reader.seed} {sample.sample_id}"
        present, absent = choose_pope_objects(reader.context.statistics, objects, questions, seed)
        # Strategies may choose the same object, which is asked about once.
        others = dict.fromkeys(word for strategy in STRATEGIES for word in absent[strategy])
        asked += [(sample, image, word, word in present) for word in (*present, *others)]
    model = reader.model
    for start in range(0, len(asked), reader.batch_size):
        part = asked[start : start + reader.batch_size]
        prompts = [prompt_text(model, presence(word), None) for _, _, word, _ in part]
        replies = generate(model, prompts, [image for _, image, _, _ in part], ANSWER, decoding)
        for (sample, _, _, there), tokens in zip(part, replies, strict=True):
            said = says_yes(str(model.tokenizer.decode(tokens)))
            yield sample, "pope_accuracy", (said == there, 1)
            yield sample, "pope_yes", (said is True, 1)
            yield sample, "pope_f1", (2 * (there and said is True), there + (said is True))


@torch.inference_mode()
def _read(reader: MentionReader, samples: Sequence[Sample]) -> Iterator[tuple[Sample, str, Sequence[float]]]:
    """Read the data's captions without their images: nats of all tokens, and their number."""
    model = reader.model
    for start in range(0, len(samples), reader.batch_size):
        part = samples[start : start + reader.batch_size]
        prompts = [prompt_text(model, None, sample.language, image=False) for sample in part]
        pairs = [tokenize_caption(model, prompt, one.caption or "") for prompt, one in zip(prompts, part, strict=True)]
        tokens, offsets = zip(*pairs, strict=True)
        batch = encode(model, prompts, [None] * len(part), tokens, offsets)
        positions = [
            TokenPosition(row, batch.caption_start[row] + index - 1, token, "", part[row].sample_id)
            for row, own in enumerate(tokens)
            for index, token in enumerate(own)
        ]
        with cache_activations(model, batch, positions) as cache:
            forward(model, batch)
        nats = torch.split(-log_probability(model, cache.hidden, cache.tokens).double(), [len(own) for own in tokens])
        for sample, own in zip(part, nats, strict=True):
            if len(own) and math.isfinite(float(own.sum())):
                yield sample, "perplexity", (float(own.sum()), len(own))
