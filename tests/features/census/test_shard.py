"""A shard's tables, and the run's that are merged from them, are those of plain loops over everything in fp64."""

import hashlib

import numpy as np
import pytest

from mmray.features.census.ranking import RANKED
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from tests.support import naive
from tests.support.samples import NOUNS, analyse, demo_samples, merged, samples

FORMS = {noun: noun for noun in NOUNS} | {"dogs": "dog", "birds": "bird"}
CASES = [("llava", "contribution"), ("llava", "gate"), ("qwen3_vl_moe", "contribution")]
CASES += [("blip2_t5", "contribution"), ("gemma3", "contribution"), ("internvl", "contribution")]


def close(found, expected):
    """Compare to 1e-4 relative; sums that cancel, to 1e-5 of the largest next to them."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


def index(row, widths):
    return sum(widths[: row["layer"]]) + row["unit"]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "score"), CASES)
def test_tables_are_those_of_plain_loops(open_model, variant, score):
    model = open_model(variant)
    found = samples()
    expected = naive.occurrences(model, found, naive.words(FORMS), score)
    assert len(expected) >= 24
    shards = [
        analyse(model, found[first:last], shard_id=shard, score=score)
        for shard, (first, last) in enumerate([(0, 5), (5, 6), (6, 12)])
    ]
    check_occurrences(model, shards, expected)
    check_concepts(model, shards, expected)
    check_rankings(model, merged(model, shards)["rankings"].to_pylist(), naive.rankings(expected, top_k=5))


def check_occurrences(model, shards, expected):
    rows = {(r["sample_id"], r["position"], r["concept"]): r for s in shards for r in s["occurrences"].to_pylist()}
    assert rows.keys() == {(o.sample_id, o.position, o.concept) for o in expected}
    assert sum(len(shard["occurrences"]) for shard in shards) == len(rows) == len(expected)
    for occurrence in expected:
        row = rows[occurrence.sample_id, occurrence.position, occurrence.concept]
        assert row["token_id"] == occurrence.token
        assert row["token"] == model.tokenizer.decode([occurrence.token]).strip()
        close(row["log_prob"], occurrence.log_prob)
        listed = [index(entry, model.widths) for entry in row["neurons"]]
        best = np.sort(occurrence.scores)[::-1][:5]
        close([entry["score"] for entry in row["neurons"]], best)
        close([entry["score"] for entry in row["neurons"]], occurrence.scores[listed])
        close([entry["activation"] for entry in row["neurons"]], occurrence.activations[listed])


def check_concepts(model, shards, expected):
    for shard in shards:
        names = set(shard["captions"]["sample_id"].to_pylist())
        here = [occurrence for occurrence in expected if occurrence.sample_id in names]
        rows = {row["concept"]: row for row in shard["concepts"].to_pylist()}
        assert rows.keys() == {occurrence.concept for occurrence in here}
        for concept, row in rows.items():
            own = [occurrence for occurrence in here if occurrence.concept == concept]
            assert row["n"] == len(own)
            assert row["neuron"] is None
            close(row["score"], sum(occurrence.scores for occurrence in own))
            if len(own) > 1:
                close(row["score_squares"], sum(occurrence.scores**2 for occurrence in own))
            else:
                assert row["score_squares"] is None
            close(row["activation"], sum(occurrence.activations for occurrence in own))
        total = shard["totals"].to_pylist()[0]
        assert total["n"] == len(here)
        close(total["score"], sum(occurrence.scores for occurrence in here))
        close(total["score_squares"], sum(occurrence.scores**2 for occurrence in here))


def check_rankings(model, rows, expected):
    assert {row["concept"] for row in rows} == expected.keys()
    assert [row["concept"] for row in rows] == sorted(row["concept"] for row in rows)
    for concept, truth in expected.items():
        own = [row for row in rows if row["concept"] == concept]
        neurons = [index(row, model.widths) for row in own]
        assert sorted(neurons) == list(range(sum(model.widths)))
        scale = np.abs(truth.score).max()
        for column, values in {
            "score": truth.score,
            "specific": truth.specific,
            "selective": truth.selective,
            "share": truth.share,
            "activation": truth.activation,
        }.items():
            close([row[column] for row in own], values[neurons])
        # A deviation is the difference of two means: where all scores are alike, their own rounding is left of it.
        spread = np.sqrt(truth.score[neurons] ** 2 + truth.std[neurons] ** 2)
        errors = np.abs(np.array([row["score_std"] for row in own]) - truth.std[neurons])
        assert (errors <= 1e-4 * truth.std[neurons] + 1e-5 * spread + 1e-9).all()
        assert {row["n"] for row in own} == {truth.n}
        assert all(row["certified"] for row in own)
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
        check_order(truth.score[neurons], scale)
        for name, values in {"specific": truth.specific, "selective": truth.selective}.items():
            ordered = sorted(own, key=lambda row: row[f"{name}_rank"])
            assert [row[f"{name}_rank"] for row in ordered] == list(range(1, len(own) + 1))
            check_order(values[[index(row, model.widths) for row in ordered]], scale)
        assert all(row["neuron"] == f"L{row['layer']}.u{row['unit']}" for row in own)


def check_order(values, scale):
    """Values fall, but for differences that fp32 does not see."""
    assert (np.diff(values) <= 1e-5 * scale).all()


def test_the_demo_s_numbers_are_those_of_plain_loops(open_model):
    model = open_model("demo")
    found, nouns = demo_samples(48)
    chosen = [next(s for s in found if s.language == language) for language in ("en", "es", "fr", "zh")]
    expected = []
    for sample in chosen:
        mentions = [(m.concept, m.start) for m in nouns.find(sample.caption, sample.language, sample.objects)]
        expected += naive.occurrences(model, [sample], lambda _, mentions=mentions: mentions)
    tables = analyse(model, chosen, nouns, top_k=300, batch_size=3)
    rows = {(row["sample_id"], row["position"]): row for row in tables["occurrences"].to_pylist()}
    assert len(rows) == len(expected) >= 4
    for occurrence in expected:
        row = rows[occurrence.sample_id, occurrence.position]
        assert (row["concept"], row["token_id"]) == (occurrence.concept, occurrence.token)
        assert row["log_prob"] == pytest.approx(occurrence.log_prob, rel=1e-4, abs=1e-5)
        close([entry["score"] for entry in row["neurons"]], np.sort(occurrence.scores)[::-1][:300])
        listed = [index(entry, model.widths) for entry in row["neurons"]]
        close([entry["activation"] for entry in row["neurons"]], occurrence.activations[listed])
    ranked = merged(model, [tables], top_k=300)["rankings"].to_pylist()
    for concept, truth in naive.rankings(expected, top_k=300).items():
        own = [row for row in ranked if row["concept"] == concept]
        neurons = [index(row, model.widths) for row in own]
        assert RANKED <= len(own) <= 3 * RANKED
        close([row["score"] for row in own], truth.score[neurons])
        close([row["specific"] for row in own], truth.specific[neurons])
        close([row["selective"] for row in own], truth.selective[neurons])
        top = [row for row in own if row["rank"] <= RANKED]
        close([row["score"] for row in top], np.sort(truth.score)[::-1][:RANKED])
        best = sorted((row for row in own if row["specific_rank"] <= RANKED), key=lambda row: row["specific_rank"])
        close([row["specific"] for row in best], np.sort(truth.specific)[::-1][:RANKED])


@pytest.mark.parametrize("score", ["contribution", "effect"])
def test_rows_that_share_backward_passes_have_as_many_nouns(open_model, score):
    settings = census_settings({"model": "demo", "data": "demo", "out": "unused", "score": score, "batch_size": 4})
    found, nouns = demo_samples(48)
    nouns_of = {}
    for items, _ in ShardAnalysis(open_model("demo"), settings, nouns, 0).encoded(found):
        for item in items:
            nouns_of.setdefault(item.prompt, []).append(len(item.mentions))
    assert sum(map(len, nouns_of.values())) == 48
    assert all(counts == sorted(counts) for counts in nouns_of.values()) == (score == "effect")


@pytest.mark.parametrize("candidates", [None, 20])
def test_the_cut_into_shards_changes_no_rank(open_model, candidates):
    model = open_model("llava")
    found = samples()
    tables = []
    for size, batch in ((12, 4), (5, 2), (1, 1), (4, 12)):
        shards = [
            analyse(model, found[first : first + size], shard_id=first, batch_size=batch, candidates=candidates)
            for first in range(0, 12, size)
        ]
        tables.append(merged(model, shards))
    certain = [
        {
            (row["concept"], row["rank"]): row
            for row in table["rankings"].to_pylist()
            if row["certified"] and row["exact"]
        }
        for table in tables
    ]
    for other in certain[1:]:
        common = certain[0].keys() & other.keys()
        assert len(common) >= (12 * 96 if candidates is None else 30)
        for concept, rank in common:
            left, right = certain[0][concept, rank], other[concept, rank]
            assert left["score"] == pytest.approx(right["score"], rel=1e-4, abs=1e-6)
            # Only neurons that fp32 can hardly tell apart may change places.
            near = [certain[0].get((concept, rank + step), left) for step in (-1, 0, 1)]
            names = {row["neuron"] for row in near if abs(row["score"] - left["score"]) < 1e-6}
            assert right["neuron"] in names
            assert right["share"] == left["share"] or len(names) > 1
    neurons = [table["neurons"].to_pylist() for table in tables]
    for row, *others in zip(*neurons, strict=True):
        for other in others:
            assert (row["n_tokens"], row["n_active"]) == (other["n_tokens"], other["n_active"])
            assert row["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-7)
            assert (row["max"], row["min"]) == pytest.approx((other["max"], other["min"]), rel=1e-4, abs=1e-7)


def test_captions_are_those_of_the_shard(open_model):
    found = samples(5, language="en", domain="photo")
    rows = analyse(open_model("llava"), found, shard_id=7)["captions"].to_pylist()
    assert sorted(row["sample_id"] for row in rows) == [sample.sample_id for sample in found]
    for row in rows:
        sample = next(sample for sample in found if sample.sample_id == row["sample_id"])
        assert row["caption"] == sample.caption
        assert (row["source"], row["language"], row["domain"], row["shard_id"]) == ("dataset", "en", "photo", 7)
        assert row["image"] == hashlib.sha256(sample.image).hexdigest()[:16]
