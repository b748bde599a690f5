"""The model's own captions are scored as if they had been given: the same tokens, probabilities and contributions."""

from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image

from mmray.features.census import shard
from mmray.features.census.settings import census_settings
from mmray.features.evaluation.settings import evaluation_settings
from mmray.features.hallucination.settings import hallucination_settings
from mmray.features.properties.settings import property_settings
from mmray.models.generation import caption_of
from mmray.models.prompting import encode, prompt_text
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons.concepts import WORD, Mention
from mmray.neurons.scoring import score_batch
from mmray.neurons.token_positions import locate_mentions
from tests.support.samples import analyse, demo_samples, samples


class EveryWord:
    """Takes every word of every caption for a noun: what tiny random models write are no nouns."""

    def find(self, caption, *_, **__):
        return [Mention(match[0].casefold(), match.start(), match.end()) for match in WORD.finditer(caption)]


@pytest.fixture
def written(monkeypatch):
    """Collect the prompts and token ids of every generation."""
    seen = []
    generate = shard.generate

    def spy(model, prompts, images, longest):
        rows = generate(model, prompts, images, min(longest, 12))
        seen.extend(zip(prompts, rows, strict=True))
        return rows

    monkeypatch.setattr(shard, "generate", spy)
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_the_generated_tokens_alone(open_model, written, variant):
    model = open_model(variant)
    found = [replace(entry, language=("en", "fr", "es")[number % 3]) for number, entry in enumerate(samples(6))]
    tables = analyse(model, found, EveryWord(), captions="generate", batch_size=6)
    captions = {row["sample_id"]: row for row in tables["captions"].to_pylist()}
    order = sorted(found, key=lambda entry: entry.language)
    assert len(written) == len(found)
    compared = 0
    for entry, (prompt, tokens) in zip(order, written, strict=True):
        assert prompt == prompt_text(model, None, entry.language)
        if entry.sample_id not in captions:
            # The model's first token ended the caption, or stood for an image that is not there.
            assert not tokens or model.parts.image_token_id in tokens
            continue
        row = captions[entry.sample_id]
        caption, offsets = caption_of(model, tokens)
        assert (row["caption"], row["source"], row["language"]) == (caption, "generated", entry.language)
        image = Image.open(BytesIO(entry.image)).convert("RGB")
        batch = encode(model, [prompt], [image], [tokens], [offsets])
        places = locate_mentions(batch, 0, entry.sample_id, EveryWord().find(caption))
        own = [r for r in tables["occurrences"].to_pylist() if r["sample_id"] == entry.sample_id]
        key = ("concept", "position", "token_id")
        assert [tuple(r[name] for name in key) for r in own] == [(p.concept, p.position, p.token) for p in places]
        scored = score_batch(model, batch, places)
        with torch.inference_mode():
            logits = model.network(**batch.to(model.device, model.network.dtype)).logits[0]
        for number, (place, r) in enumerate(zip(places, own, strict=True)):
            predicted = logits[place.position]
            # Written greedily: nothing leads the token, up to what padding on the other side changes.
            assert predicted[place.token] >= predicted.max() - 1e-3
            assert r["log_prob"] == pytest.approx(float(predicted.log_softmax(0)[place.token]), abs=1e-3)
            best = torch.cat([layer[number] for layer in scored.scores]).topk(5).values
            assert [entry["score"] for entry in r["neurons"]] == pytest.approx(best.tolist(), rel=1e-3, abs=1e-4)
            compared += 1
    # PaliGemma's tiny model writes location tokens, T5's and Mllama's end early.
    assert compared >= 3


def test_the_demo_s_own_captions_are_scored_like_given_ones(open_model):
    model = open_model("demo")
    found, nouns = demo_samples(48)
    chosen = [next(s for s in found if s.language == language) for language in ("en", "es", "fr", "zh")]
    own = analyse(model, chosen, EveryWord(), captions="generate")
    captions = {row["sample_id"]: row["caption"] for row in own["captions"].to_pylist()}
    assert len(captions) == 4
    assert all(caption.rstrip()[-1] in ".。" for caption in captions.values())
    given = analyse(model, [replace(s, caption=captions[s.sample_id]) for s in chosen], EveryWord())
    rows, others = (
        {(row["sample_id"], row["position"]): row for row in tables["occurrences"].to_pylist()}
        for tables in (own, given)
    )
    assert rows.keys() == others.keys()
    assert len(rows) >= 16
    for place, row in rows.items():
        assert row["token_id"] == others[place]["token_id"]
        assert row["log_prob"] == pytest.approx(others[place]["log_prob"], abs=1e-4)
        scores, expected = ([entry["score"] for entry in each["neurons"]] for each in (row, others[place]))
        assert scores == pytest.approx(expected, rel=1e-4)
    # Nouns are looked for in all that the data has, for the model may name what no list has for its image.
    named = analyse(model, chosen, nouns, captions="generate")["occurrences"]["concept"].to_pylist()
    assert len(named) >= 4
    assert set(named) <= {mention.concept for caption in captions.values() for mention in EveryWord().find(caption)}


@pytest.mark.parametrize("score", ["random", "gradient", "gate"])
def test_every_score_takes_generated_captions(open_model, written, score):
    tables = analyse(open_model("llava_next"), samples(4), EveryWord(), captions="generate", score=score)
    assert len(tables["occurrences"]) > 0
    assert len(tables["captions"]) == 4
    assert len(tables["errors"]) == 0


def test_captions_are_as_long_as_asked_for(open_model, written):
    model, found = open_model("llava_next"), samples(4)
    for longest in (2, 5):
        written.clear()
        tables = analyse(model, found, EveryWord(), captions="generate", longest=longest)
        assert max(len(tokens) for _, tokens in written) == longest
        texts = {caption_of(model, tokens)[0] for _, tokens in written}
        assert {row["caption"] for row in tables["captions"].to_pylist()} <= texts


def test_the_length_of_generated_captions_is_in_the_fingerprint():
    prints = {
        captions: {
            census_settings(
                {"model": "m", "data": "d", "out": "o", "captions": captions, "longest": longest}
            ).fingerprint({})
            for longest in (64, 512)
        }
        for captions in ("dataset", "generate")
    }
    assert len(prints["generate"]) == 2
    # The data's captions are taken whole.
    assert len(prints["dataset"]) == 1
    assert len({property_settings({"run": "r", "longest": longest}).fingerprint({}) for longest in (32, 64)}) == 2
    assert len({hallucination_settings({"run": "r", "longest": longest}).fingerprint({}) for longest in (64, 512)}) == 2
    asked = {"run": "r", "edit": "e", "data": "d"}
    assert len({evaluation_settings(asked | {"longest": longest}).fingerprint({}) for longest in (64, 512)}) == 2
    assert property_settings({"run": "r"}).longest == 32
    assert evaluation_settings(asked).longest == hallucination_settings({"run": "r"}).longest == 64
