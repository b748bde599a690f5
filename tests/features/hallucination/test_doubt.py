"""Mentions that are doubted: their probability by one forward per view, and captions without their words."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmray.data.samples import Sample
from mmray.features.hallucination.doses import doubt_of
from mmray.features.hallucination.doubt import mention_probabilities, without_doubted
from mmray.features.hallucination.mentions import MentionReader
from mmray.models.combined_logits import views_of
from mmray.models.decodings import GREEDY, decoding_of
from mmray.models.prompting import encode
from mmray.objects.words import ObjectWords
from tests.support.scenes import scenes

AVERAGE = decoding_of("average")


@pytest.fixture(scope="module")
def reader(demo):
    words = sorted({name for row in scenes(12) for name in row["objects"]})
    statistics = SimpleNamespace(vocabulary=words, translations={})
    context = SimpleNamespace(
        options=SimpleNamespace(prompt=None, prefix=None), statistics=statistics, words=ObjectWords()
    )
    return MentionReader(demo, context, batch_size=4, longest=16, seed=0)


@pytest.fixture(scope="module")
def pairs():
    rows = scenes(5)
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    samples = [
        Sample(f"s{number}", "here", row["image"]["bytes"], "", "en", objects=tuple(row["objects"]))
        for number, row in enumerate(rows)
    ]
    return list(zip(samples, images, strict=True))


def alone(reader, caption, mention, image):
    """Return the probability of a mention's tokens from one forward without a batch."""
    model = reader.model
    batch = encode(model, [caption.prompt], [image], [caption.tokens], [caption.offsets])
    with torch.inference_mode():
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits[0].double().log_softmax(dim=-1)
    first = batch.caption_start[0] - 1
    tokens = [n for n, (start, stop) in enumerate(caption.offsets) if stop > mention.start and start < mention.stop]
    return math.exp(sum(float(logits[first + number, caption.tokens[number]]) for number in tokens))


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [GREEDY, AVERAGE, decoding_of("average:0.3"), decoding_of("vcd")], ids=str)
def test_a_mention_is_as_likely_as_the_views_that_a_decoding_averages_say(reader, pairs, decoding):
    captions = reader.captions(pairs, decoding)
    found = mention_probabilities(reader, captions, decoding)
    share = decoding.strength if decoding.name == "average" else 0.0
    compared = 0
    for caption in captions:
        views = [caption.image, *(views_of([caption.image], decoding) if share else ())]
        for number, mention in enumerate(caption.mentions):
            image, *others = (alone(reader, caption, mention, view) for view in views)
            expected = (1 - share) * image + (share * sum(others) / len(others) if share else 0.0)
            assert found[caption.sample.sample_id, number] == pytest.approx(expected, abs=1e-3)
            compared += 1
    assert compared == len(found) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [GREEDY, AVERAGE], ids=str)
def test_only_captions_with_doubted_mentions_are_written_again(reader, pairs, decoding):
    before = reader.captions(pairs, decoding)
    likely = mention_probabilities(reader, before, decoding)
    least = {caption.sample.sample_id: 1.0 for caption in before}
    for (name, _), probability in likely.items():
        least[name] = min(least[name], probability)
    first, second = sorted(least.values())[:2]
    assert first < second
    between = (first + second) / 2
    after = without_doubted(reader, pairs, between, decoding)
    changed = [new.sample.sample_id for old, new in zip(before, after, strict=True) if old.tokens != new.tokens]
    assert changed == [name for name, value in least.items() if value == first]
    (old,) = (caption for caption in before if caption.sample.sample_id == changed[0])
    (new,) = (caption for caption in after if caption.sample.sample_id == changed[0])
    doubted = [one for number, one in enumerate(old.mentions) if likely[changed[0], number] < between]
    assert not {one.concept for one in doubted} & {one.concept for one in new.mentions}


def test_a_doubt_is_a_probability_by_the_model_or_a_decoding():
    assert doubt_of("0.3") == (0.3, GREEDY)
    assert doubt_of("0.3:average") == (0.3, AVERAGE)
    assert doubt_of("1:vcd:0.5") == (1.0, decoding_of("vcd:0.5"))
