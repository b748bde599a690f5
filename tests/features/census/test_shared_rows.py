"""Captions of one image share a row: every table is that of rows apart, and a bad caption costs itself alone."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from mmray.features.census import shard
from mmray.features.census.tables import SUMS
from mmray.models.prompting import tokenize_caption
from mmray.neurons import row_sharing, scoring
from mmray.neurons.concepts import NounSource
from mmray.neurons.row_sharing import RowSharing
from mmray.runs.tables import list_values
from tests.support.refusals import MEMORY, Refusing, stages
from tests.support.samples import CAPTIONS, LEXICON, NOUNS, analyse, merged, sample, samples, settings

EVERYTHING = NounSource("lexicon", lexicon={None: NOUNS})
SPOILT = "A boy ~ and a dog."
"""A caption with a token that no other has."""


def several(*extra):
    """Five captions of one image, four of another in two languages and domains, one each of two more, one of text."""
    found = samples()
    image, other = found[0].image, found[1].image
    facts = [{"language": "en", "domain": "photo"}, {"language": "fr", "domain": "photo"}]
    return [
        *(replace(entry, image=image, domain="art") for entry in found[:4]),
        # Twice the same caption, and one that begins like another.
        replace(found[4], image=image, caption=CAPTIONS[0], domain="art"),
        *(replace(entry, image=other, **facts[number % 2]) for number, entry in enumerate(found[5:9])),
        *found[9:11],
        replace(found[11], image=None),
        *(replace(sample(20 + number, caption), image=image) for number, caption in enumerate(extra)),
    ]


def rows_of(table, *keys):
    return {tuple(row[key] for key in keys): row for row in table.to_pylist()}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def same(model, together, apart):
    """Compare all parts of a shard, and the run's rankings."""
    images = {row["sample_id"]: row["image"] for row in apart["captions"].to_pylist()}
    assert rows_of(together["captions"], "sample_id") == rows_of(apart["captions"], "sample_id")
    assert together["errors"].equals(apart["errors"])
    ours, theirs = (rows_of(tables["occurrences"], "sample_id", "position", "concept") for tables in (together, apart))
    assert ours.keys() == theirs.keys()
    assert len(together["occurrences"]) == len(apart["occurrences"]) == len(ours)
    for key, row in theirs.items():
        assert (ours[key]["token_id"], ours[key]["token"]) == (row["token_id"], row["token"])
        close(ours[key]["log_prob"], row["log_prob"])
        close([entry["score"] for entry in ours[key]["neurons"]], [entry["score"] for entry in row["neurons"]])
    for name, keys, numbers in (
        ("concepts", ["concept", "n"], list(SUMS)),
        ("activity", ["module", "label_kind", "label", "modality", "n_tokens"], ["n_active", "sum", "sum_squares"]),
    ):
        ours, theirs = (rows_of(tables[name], *keys) for tables in (together, apart))
        assert ours.keys() == theirs.keys()
        for column in numbers:
            for one, other in zip(values_of(together[name], column), values_of(apart[name], column), strict=True):
                # A gate near zero may fall on either side of it.
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=2 if column == "n_active" else 1e-4)
    assert together["totals"]["n"].equals(apart["totals"]["n"])
    assert rows_of(together["examples"], "sign", "rank").keys() == rows_of(apart["examples"], "sign", "rank").keys()
    ids = [tables["captions"]["sample_id"].to_pylist() for tables in (together, apart)]
    for one, other in zip(together["examples"].to_pylist(), apart["examples"].to_pylist(), strict=True):
        close(one["activation"], other["activation"])
        shown = [
            [images[names[number]] or names[number] for number in row["sample"]]
            for names, row in zip(ids, (one, other), strict=True)
        ]
        agree = np.mean([a == b for a, b in zip(*shown, strict=True)])
        # Neurons with the same activation at two images may name either.
        assert agree > 0.95
    one, other = (ranked(model, tables) for tables in (together, apart))
    for row, expected in zip(one, other, strict=True):
        close(row["score"], expected["score"])
        assert row["concept"] == expected["concept"]
        assert row["neuron"] == expected["neuron"] or row["score"] == pytest.approx(expected["score"], rel=1e-4)


def ranked(model, tables):
    language = tables["activity"].filter(pc.equal(tables["activity"]["module"], "language"))
    return merged(model, [tables | {"activity": language}])["rankings"].to_pylist()


def values_of(table, column):
    lists = pa.types.is_list(table.schema.field(column).type)
    return list_values(table[column]) if lists else table[column].to_pylist()


@pytest.fixture
def batches(monkeypatch):
    """The rows and samples of every batch that was scored."""
    found, score = [], shard.score_batch

    def note(model, batch, *rest, **options):
        found.append((batch.rows, len(batch.tokens)))
        return score(model, batch, *rest, **options)

    monkeypatch.setattr(shard, "score_batch", note)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "idefics3", "qwen3_vl_moe"])
def test_tables_are_those_of_rows_apart(open_model, batches, variant):
    model = open_model(variant)
    found = [entry for entry in several() if entry.image is not None or variant != "paligemma"]
    together = analyse(model, found, batch_size=12, sharing=RowSharing(model))
    shared = Counter(batches)
    batches.clear()
    apart = analyse(model, found, batch_size=12)
    # PaliGemma's image sees the prompt, so each language has a row of its own.
    assert shared[(3, 9) if variant == "paligemma" else (2, 9)] == 1
    assert all(rows == own for rows, own in batches)
    same(model, together, apart)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rows"), [(1, 1), (2, 1), (3, 1), (7, 1), (100, 2)])
def test_tables_do_not_depend_on_the_batch(open_model, batches, size, rows):
    model = open_model("llava")
    together = analyse(model, several(), batch_size=size, sharing=RowSharing(model))
    assert max(own for _, own in batches) <= size
    assert max(own for own, samples in batches if samples > own or size == 1) == rows
    same(model, together, analyse(model, several(), batch_size=size))


@pytest.mark.parametrize(
    "values", [{"score": "gate", "fold_norm": True}, {"module": "vision"}, {"pieces": "sum"}, {"score": "random"}]
)
def test_every_forward_score_and_the_tower_are_as_apart(open_model, values):
    model = open_model("llava")
    together = analyse(model, several(), sharing=RowSharing(model), batch_size=12, **values)
    same(model, together, analyse(model, several(), batch_size=12, **values))


@pytest.mark.parametrize("score", ["gradient-last", "effect"])
def test_backward_passes_have_rows_apart(open_model, batches, score):
    model = open_model("llava")
    together = analyse(model, several(), score=score, sharing=RowSharing(model))
    assert all(rows == own for rows, own in batches)
    same(model, together, analyse(model, several(), score=score))


def test_generated_captions_share_rows_too(open_model, batches):
    model = open_model("llava")
    found = [replace(entry, language=None) for entry in several()]
    together = analyse(model, found, EVERYTHING, captions="generate", batch_size=12, sharing=RowSharing(model))
    assert any(own > rows for rows, own in batches)
    same(model, together, analyse(model, found, EVERYTHING, captions="generate", batch_size=12))


def test_an_image_counts_once_per_label(open_model):
    model = open_model("llava")
    rows = analyse(model, several(), sharing=RowSharing(model), module="vision")["activity"].to_pylist()
    images = {
        (row["module"], row["label_kind"], row["label"]): row["n_tokens"] for row in rows if row["modality"] == "image"
    }
    own = {module: images[module, "domain", "art"] for module in ("language", "vision")}
    assert own["language"] == 16
    for (module, kind, label), tokens in images.items():
        expected = {("all", "all"): 4, ("domain", "art"): 1, ("domain", "photo"): 1}.get((kind, label), 1)
        assert tokens == expected * own[module], (module, kind, label)
    assert {("language", "en"), ("language", "fr"), ("domain", "photo")} <= {key[1:] for key in images}


@pytest.mark.parametrize("largest", [1, 2, 3])
def test_a_forward_without_memory_is_tried_in_halves(open_model, monkeypatch, largest):
    model = open_model("llava")
    expected, sharing = analyse(model, several()), RowSharing(model)
    assert not sharing.problem
    forward = Refusing(scoring.forward, lambda _, batch: len(batch.tokens) > largest, MEMORY)
    monkeypatch.setattr(scoring, "forward", forward)
    tables = analyse(model, several(), batch_size=12, sharing=sharing)
    assert forward.refusals >= 3
    same(model, tables, expected)


@pytest.mark.parametrize("place", ["forward", "encode_shared"])
def test_a_caption_that_can_t_be_run_costs_itself_alone(open_model, monkeypatch, place):
    model, sharing = open_model("llava"), RowSharing(open_model("llava"))
    assert not sharing.problem
    wanted = tokenize_caption(model, "x", SPOILT)[0]
    if place == "forward":
        refusing = Refusing(scoring.forward, lambda _, batch: wanted in batch.tokens, MEMORY)
        monkeypatch.setattr(scoring, "forward", refusing)
    else:
        monkeypatch.setattr(shard, "encode", Refusing(shard.encode, lambda *call: wanted in call[3], OSError("no")))
        refusing = Refusing(shard.encode_shared, lambda *call: wanted in call[3], OSError("no"))
        monkeypatch.setattr(shard, "encode_shared", refusing)
    tables = analyse(model, several(SPOILT), batch_size=12, sharing=sharing)
    assert refusing.refusals >= 1
    assert stages(tables) == {("s20", "forward" if place == "forward" else "encode")}
    monkeypatch.undo()
    same(model, tables | {"errors": tables["errors"].slice(0, 0)}, analyse(model, several()))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_costs_its_own_caption_alone(open_model, number):
    """Attention carries it to the whole row, because 0 times it is not 0."""
    model, sharing = open_model("llava"), RowSharing(open_model("llava"))
    expected = analyse(model, several())
    assert not sharing.problem
    (token,) = model.tokenizer("~", add_special_tokens=False)["input_ids"]
    assert token in tokenize_caption(model, "x", SPOILT)[0]
    weight = model.network.get_input_embeddings().weight
    before = weight[token].clone()
    try:
        weight[token] = number
        tables = analyse(model, several(SPOILT), batch_size=12, sharing=sharing)
    finally:
        weight[token] = before
    assert stages(tables) == {("s20", "score")}
    same(model, tables | {"errors": tables["errors"].slice(0, 0)}, expected)


def test_a_bad_image_costs_each_of_its_captions(open_model):
    model = open_model("llava")
    bad = [sample(30 + number, caption, image=b"no image") for number, caption in enumerate(CAPTIONS[:3])]
    tables = analyse(model, [*bad, *several()], sharing=RowSharing(model))
    assert stages(tables) == {(f"s{30 + number}", "decode") for number in range(3)}
    same(model, tables | {"errors": tables["errors"].slice(0, 0)}, analyse(model, several()))


def test_a_model_that_can_t_share_says_so_and_has_rows_apart(open_model, monkeypatch, batches):
    model, sharing = open_model("llava"), RowSharing(open_model("llava"))
    monkeypatch.setattr(row_sharing, "_difference", lambda *_: "activations differ by 3.0e-01")
    analysis = shard.ShardAnalysis(model, settings(), LEXICON, 0, sharing)
    analysis.run(several())
    assert all(rows == own for rows, own in batches)
    assert analysis.notes == {"captions of an image are in rows of their own: activations differ by 3.0e-01"}
    alone = shard.ShardAnalysis(model, settings(), LEXICON, 0, sharing)
    alone.run(samples(4))
    assert not alone.notes
