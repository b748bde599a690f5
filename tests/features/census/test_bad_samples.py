"""What can't be used is a row in `errors`; what can is counted once, however often its batch was cut in halves."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mmray.data import images
from mmray.data.samples import Failure
from mmray.features.census import shard
from mmray.features.census.tables import SUMS
from mmray.models import generation
from mmray.models.prompting import tokenize_caption
from mmray.neurons import scoring
from mmray.neurons.concepts import NounSource
from mmray.runs.tables import list_values
from tests.support.refusals import MEMORY, Refusing, stages
from tests.support.samples import CAPTIONS, LEXICON, NOUNS, analyse, merged, picture, png, sample, samples, settings


def test_a_sample_that_fails_is_not_skipped_as_well(open_model):
    analysis = shard.ShardAnalysis(open_model("llava"), settings(), LEXICON, 0)
    analysis.run([sample(1, "nothing to see here", image=b"no image"), sample(2, "nothing to see here")])
    assert [failure.sample_id for failure in analysis.failures] == ["s1"]
    assert +analysis.skipped == {"no noun": 1}


def test_what_is_skipped_is_counted_once_however_often_its_batch_was_halved(open_model, monkeypatch):
    model, score = open_model("llava"), shard.score_batch

    def score_batch(model, batch, *rest, **options):
        if len(batch.tokens) > 1:
            raise torch.OutOfMemoryError("too many")
        return score(model, batch, *rest, **options)

    monkeypatch.setattr(shard, "score_batch", score_batch)
    analysis = shard.ShardAnalysis(model, settings(batch_size=4), LEXICON, 0)
    analysis.run([sample(number, "nothing to see here") for number in range(4)])
    assert +analysis.skipped == {"no noun": 4}


def same(tables, expected):
    """Compare what was counted: captions, occurrences, sums of concepts and of tokens, extremes."""
    for name in ("captions", "occurrences"):
        rows, others = (Counter(row["sample_id"] for row in each[name].to_pylist()) for each in (tables, expected))
        assert rows == others
    assert tables["totals"]["n"].to_pylist() == expected["totals"]["n"].to_pylist()
    columns = {
        "concepts": (["concept", "n"], ["score", "activation"]),
        "activity": (["label_kind", "label", "modality", "n_tokens"], ["n_active", "sum", "sum_squares"]),
        "examples": (["sign", "rank"], ["activation"]),
    }
    for name, (keys, numbers) in columns.items():
        rows, others = (each[name].to_pylist() for each in (tables, expected))
        assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in others]
        for column in numbers:
            lists = (each[name][column].to_pylist() for each in (tables, expected))
            for ours, theirs in zip(*lists, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_that_can_t_be_read_are_errors(open_model, monkeypatch):
    model = open_model("llava")
    whole = png(picture(1))
    bad = {
        "text": b"not an image",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "huge": png(picture(3, 60, 60)),
    }
    monkeypatch.setattr(images, "LARGEST_IMAGE", 59 * 60)
    found = [sample(number, "a dog", sample_id=name, image=data) for number, (name, data) in enumerate(bad.items())]
    good = samples(6)
    mixed = [good[0], found[0], *good[1:4], *found[1:], *good[4:]]
    tables = analyse(model, mixed)
    assert stages(tables) == {(name, "decode") for name in bad}
    messages = {row["sample_id"]: row["message"] for row in tables["errors"].to_pylist()}
    assert "60 × 60 pixels, more than 3,540" in messages["huge"]
    assert {row["source"] for row in tables["errors"].to_pylist()} == {f"row {number}" for number in range(4)}
    same(tables, analyse(model, good))


@pytest.mark.parametrize("captions", ["dataset", "generate"])
def test_a_batch_is_parted_where_its_pixels_are_too_many(open_model, monkeypatch, captions):
    model = open_model("llava")
    everything = NounSource("lexicon", lexicon={None: NOUNS})
    expected = analyse(model, samples(), everything, batch_size=12, captions=captions)
    decoded, most = [0], []
    decode, work = shard.decode_image, "encode" if captions == "dataset" else "generate"

    def count(encoded, background):
        decoded[0] += 40 * 56
        return decode(encoded, background)

    def note(call):
        def noted(*arguments):
            most.append(decoded[0])
            decoded[0] = 0
            return call(*arguments)

        return noted

    monkeypatch.setattr(shard, "decode_image", count)
    monkeypatch.setattr(shard, work, note(getattr(shard, work)))
    monkeypatch.setattr(shard, "BUDGET", 5 * 40 * 56)
    tables = analyse(model, samples(), everything, batch_size=12, captions=captions)
    assert max(most) == 5 * 40 * 56
    assert sum(most) == 12 * 40 * 56
    same(tables, expected)


@pytest.mark.slow
@pytest.mark.parametrize("captions", ["dataset", "generate"])
def test_a_shard_is_analysed_in_parts_where_its_images_are_too_large_together(open_model, monkeypatch, captions):
    model = open_model("llava")
    everything = NounSource("lexicon", lexicon={None: NOUNS})
    found = samples()
    expected = analyse(model, found, everything, batch_size=2, captions=captions)
    sizes = [len(entry.image) for entry in found]
    monkeypatch.setattr(shard, "IMAGE_BYTES", 4 * max(sizes))
    read, first = [], []
    decode = shard.decode_image
    monkeypatch.setattr(shard, "decode_image", lambda *given: first.append(len(read)) or decode(*given))

    def reading():
        for entry in found:
            read.append(entry)
            yield entry

    tables = analyse(model, reading(), everything, batch_size=2, captions=captions)
    assert first[0] == 5
    same(tables, expected)


def test_a_narrow_image_costs_itself_alone(open_model):
    """A few hundred bytes, which a processor that scales the short side makes gigabytes of."""
    model = open_model("llava")
    narrow = sample(99, "a dog", image=png(Image.new("RGB", (150_000, 1))))
    tables = analyse(model, [*samples(5), narrow, *samples()[5:]], batch_size=12)
    (row,) = tables["errors"].to_pylist()
    assert (row["sample_id"], row["stage"]) == ("s99", "decode")
    assert "150,000 × 1 pixels: one side is more than 200 times the other" in row["message"]
    same(tables, analyse(model, samples(), batch_size=12))


def test_a_caption_with_the_image_token_costs_itself_alone(open_model):
    model = open_model("llava")
    token = model.tokenizer.decode([model.parts.image_token_id])
    good = samples(3)
    tables = analyse(model, [good[0], sample(20, f"a dog {token} and a cat", sample_id="token"), *good[1:]])
    assert stages(tables) == {("token", "read")}
    assert tables["errors"]["message"][0].as_py() == (
        f"the caption contains {token}, which stands for an image: remove it"
    )
    same(tables, analyse(model, good))


def test_captions_that_can_t_be_used_are_errors(open_model):
    model = open_model("llava")
    good = samples(5)
    failure = Failure("f", "file.parquet", "read", "row 3 is cut off")
    bad = [sample(20, "", sample_id="empty"), sample(21, " \n\t", sample_id="blank")]
    tables = analyse(model, [failure, *good, *bad], shard_id=4)
    assert stages(tables) == {("f", "read"), ("empty", "read"), ("blank", "read")}
    assert {row["shard_id"] for row in tables["errors"].to_pylist()} == {4}
    same(tables, analyse(model, good))


def test_a_caption_without_tokens_is_an_error(open_model, monkeypatch):
    model = open_model("llava")
    tokenize = shard.tokenize_captions

    def without_zero_width(model, prompts, captions):
        found = zip(tokenize(model, prompts, captions), captions, strict=True)
        return [([], []) if caption == "\u200b" else tokens for tokens, caption in found]

    monkeypatch.setattr(shard, "tokenize_captions", without_zero_width)
    tables = analyse(model, [*samples(3), sample(9, "\u200b")])
    assert stages(tables) == {("s9", "read")}
    same(tables, analyse(model, samples(3)))


def test_a_caption_without_nouns_is_skipped_and_counted_still(open_model):
    model = open_model("llava")
    analysis = shard.ShardAnalysis(model, settings(), LEXICON, 0)
    tables = analysis.run([*samples(3), sample(9, "nothing to see here")])
    assert len(tables["errors"]) == 0
    assert +analysis.skipped == {"no noun": 1}
    assert len(tables["captions"]) == 4
    assert len(tables["occurrences"]) == len(analyse(model, samples(3))["occurrences"])


ERRORS = [MEMORY, RuntimeError("no"), ValueError("no"), IndexError("no"), TypeError("no"), KeyError("no")]


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("largest", [1, 2, 3])
def test_a_forward_without_memory_is_tried_in_halves(open_model, monkeypatch, largest, error):
    model = open_model("llava")
    expected = analyse(model, samples(), batch_size=7)
    forward = Refusing(scoring.forward, lambda _, batch: len(batch.tokens) > largest, error)
    monkeypatch.setattr(scoring, "forward", forward)
    tables = analyse(model, samples(), batch_size=7)
    assert forward.refusals >= 3
    assert len(tables["errors"]) == 0
    same(tables, expected)


def test_memory_that_runs_out_behind_some_layers_counts_nothing_twice(open_model, monkeypatch):
    model = open_model("llava")
    expected = analyse(model, samples(), batch_size=6)
    add = shard.TokenStatistics.add
    calls = []

    def refuse(statistics, layer, activation, opened):
        calls.append(layer)
        add(statistics, layer, activation, opened)
        if layer == 1 and statistics._batch.rows > 2:
            raise MEMORY

    monkeypatch.setattr(shard.TokenStatistics, "add", refuse)
    tables = analyse(model, samples(), batch_size=6)
    assert calls.count(0) > 12 / 2
    assert len(tables["errors"]) == 0
    same(tables, expected)


@pytest.mark.parametrize("place", ["forward", "encode"])
def test_a_sample_that_can_t_be_run_is_left_out_alone(open_model, monkeypatch, place):
    model = open_model("llava")
    culprits = {CAPTIONS[3], CAPTIONS[7]}
    expected = analyse(model, [entry for entry in samples() if entry.caption not in culprits])
    wanted = {tuple(tokenize_caption(model, "x", caption)[0]) for caption in culprits}

    def holds(batch_tokens):
        return any(tuple(tokens) in wanted for tokens in batch_tokens)

    if place == "forward":
        refusing = Refusing(scoring.forward, lambda _, batch: holds(batch.tokens), MEMORY)
        monkeypatch.setattr(scoring, "forward", refusing)
    else:
        refusing = Refusing(shard.encode, lambda *call: holds(call[3]), OSError("two\nlines"))
        monkeypatch.setattr(shard, "encode", refusing)
    tables = analyse(model, samples(), batch_size=12)
    assert stages(tables) == {("s3", place), ("s7", place)}
    assert all("\n" not in row["message"] for row in tables["errors"].to_pylist())
    same(tables, expected)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_shard_of_which_nothing_can_be_run_has_empty_tables(open_model, monkeypatch, count):
    model = open_model("llava")
    monkeypatch.setattr(shard, "encode", Refusing(shard.encode, lambda *_: True, ValueError("no image for the token")))
    tables = analyse(model, samples(count))
    assert stages(tables) == {(f"s{number}", "encode") for number in range(count)}
    assert {name: len(table) for name, table in tables.items() if name not in ("errors", "totals")} == dict.fromkeys(
        ("captions", "occurrences", "concepts", "activity", "examples"), 0
    )
    monkeypatch.undo()
    whole = analyse(model, samples(4), shard_id=1)
    together, alone = merged(model, [tables, whole, tables]), merged(model, [whole])
    assert together.keys() == alone.keys()
    assert all(together[name].equals(alone[name]) for name in alone)
    empty = merged(model, [tables])
    assert len(empty["rankings"]) == len(empty["examples"]) == 0
    assert set(empty["neurons"]["n_tokens"].to_pylist()) == {0}


def test_a_processor_that_refuses_long_batches_gets_short_ones(open_model, monkeypatch):
    model = open_model("llava")
    expected = analyse(model, samples(), batch_size=12)
    monkeypatch.setattr(shard, "encode", Refusing(shard.encode, lambda *call: len(call[1]) > 2, ValueError("too many")))
    tables = analyse(model, samples(), batch_size=12)
    assert len(tables["errors"]) == 0
    same(tables, expected)


@pytest.mark.parametrize("captions", ["dataset", "generate"])
@pytest.mark.parametrize("variant", ["llava", "qwen2_vl", "mllama"])
def test_samples_with_and_without_an_image_share_a_shard(open_model, variant, captions):
    model = open_model(variant)
    found = [
        entry if number % 2 else sample(number, entry.caption, image=None) for number, entry in enumerate(samples(7))
    ]
    tables = analyse(model, found, batch_size=3, captions=captions)
    assert len(tables["captions"]) == 7
    assert len(tables["errors"]) == 0
    assert all(len(row["sum"]) == sum(model.widths) for row in tables["activity"].to_pylist())
    assert all(len(row["activation"]) == sum(model.widths) for row in tables["examples"].to_pylist())
    alone = analyse(model, [entry for entry in found if entry.image is None], captions=captions)
    assert all(len(row["sum"]) == sum(model.widths) for row in alone["activity"].to_pylist())
    assert {row["modality"] for row in alone["activity"].to_pylist()} == {"text"}
    if variant == "mllama":
        # Without an image the second block, which looks at it, is left out.
        assert not np.any(alone["activity"]["sum"][0].as_py()[48:])
        assert np.any(alone["activity"]["sum"][0].as_py()[:48])


@pytest.mark.parametrize("captions", ["dataset", "generate"])
@pytest.mark.parametrize("variant", ["paligemma", "blip2_opt", "instructblip_t5"])
def test_families_that_need_an_image_say_so_of_each_sample_without(open_model, variant, captions):
    model = open_model(variant)
    found = [entry if number else sample(0, "a dog", image=None) for number, entry in enumerate(samples(3))]
    tables = analyse(model, [*found, sample(8, "a cat", image=None)], captions=captions)
    assert {name for name, _ in stages(tables)} == {"s0", "s8"}
    assert sorted(tables["captions"]["sample_id"].to_pylist()) == ["s1", "s2"]


def test_generation_without_memory_is_tried_in_halves(open_model, monkeypatch):
    model = open_model("llava")
    everything = NounSource("lexicon", lexicon={None: NOUNS})
    expected = analyse(model, samples(7), everything, batch_size=7, captions="generate")
    generate = Refusing(generation.generate, lambda *call: len(call[1]) > 2, MEMORY)
    monkeypatch.setattr(shard, "generate", generate)
    tables = analyse(model, samples(7), everything, batch_size=7, captions="generate")
    assert generate.refusals >= 3
    assert len(tables["captions"]) == 7
    assert stages(tables) == stages(expected)
    generate.when = lambda *call: True
    tables = analyse(model, samples(3), everything, captions="generate")
    assert stages(tables) == {(f"s{number}", "generate") for number in range(3)}


def test_a_model_that_writes_nothing_is_an_error(open_model, monkeypatch):
    model = open_model("llava")
    monkeypatch.setattr(shard, "generate", lambda *call: [[] for _ in call[1]])
    assert stages(analyse(model, samples(2), captions="generate")) == {("s0", "generate"), ("s1", "generate")}


def test_errors_come_in_the_same_order_whatever_the_machine(open_model):
    model = open_model("llava")
    bad = [sample(number, "nothing" if number % 2 else "a dog", image=b"x") for number in range(6)]
    first, second = (analyse(model, found, batch_size=size)["errors"] for found, size in ((bad, 1), (bad[::-1], 6)))
    assert first.equals(second)


def test_a_caption_longer_than_the_model_reads_is_an_error_and_a_text_is_cut(open_model):
    model, words = open_model("llava"), "a dog " * open_model("llava").context
    tables = analyse(model, [sample(0, "a dog", image=None), sample(1, words, image=None), sample(2, words)])
    texts = {row["sample_id"]: row["caption"] for row in tables["captions"].to_pylist()}
    assert texts.pop("s0") == "a dog"
    assert "".join(texts[f"s1#w{number}"] for number in range(len(texts))) == words
    (row,) = tables["errors"].to_pylist()
    assert (row["sample_id"], row["stage"]) == ("s2", "read")
    assert row["message"].endswith(f"the model reads {model.context:,}: shorten the caption")


def finite(tables):
    """Return whether every sum of a shard is a finite number."""
    columns = {"concepts": list(SUMS), "totals": ["score", "score_squares"], "activity": ["sum", "sum_squares"]}
    numbers = [list_values(tables[name][column]) for name, own in columns.items() for column in own]
    return all(np.isfinite(part).all() for column in numbers for part in column)


def spoilt(monkeypatch, culprits, number, part="scores"):
    """Make scores or activations of neurons 7 and 9 of the second layer this number at the samples' nouns."""
    score = shard.score_batch

    def spoil(model, batch, places, *arguments, **named):
        scored = score(model, batch, places, *arguments, **named)
        rows = [place for place, own in enumerate(places) if own.sample_id in culprits]
        getattr(scored, part)[1][rows, 7] = number
        getattr(scored, part)[1][rows, 9] = number
        return scored

    monkeypatch.setattr(shard, "score_batch", spoil)


@pytest.mark.parametrize("part", ["scores", "activation"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_leave_the_sample_out(open_model, monkeypatch, number, part):
    model = open_model("llava")
    expected = analyse(model, [entry for entry in samples() if entry.sample_id not in ("s3", "s7")], batch_size=12)
    spoilt(monkeypatch, {"s3", "s7"}, number, part)
    tables = analyse(model, samples(), batch_size=12)
    assert stages(tables) == {("s3", "score"), ("s7", "score")}
    for row in tables["errors"].to_pylist():
        assert row["message"] == "NaN or infinity in the scores or activations of 2 neurons"
        assert row["source"] == f"row {row['sample_id'][1:]}"
    assert finite(tables)
    same(tables, expected)


def test_a_shard_of_which_no_score_is_finite_has_empty_sums(open_model, monkeypatch):
    model = open_model("llava")
    spoilt(monkeypatch, {f"s{number}" for number in range(5)}, np.nan)
    tables = analyse(model, samples(5))
    assert stages(tables) == {(f"s{number}", "score") for number in range(5)}
    assert {len(tables[name]) for name in ("captions", "occurrences", "concepts", "activity", "examples")} == {0}
    assert finite(tables)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e25])
@pytest.mark.parametrize("module", ["language", "vision"])
def test_activations_between_the_nouns_that_are_not_finite_leave_the_sample_out(
    open_model, monkeypatch, number, module
):
    # Of 1e25 the square is infinite in fp32.
    model = open_model("llava")
    found = samples()
    found[4] = sample(4, CAPTIONS[4], domain="bad")
    expected = analyse(model, [*found[:4], *found[5:]], batch_size=12, module=module)
    add = shard.TokenStatistics.add

    def spoil(statistics, layer, activation, opened):
        row = statistics._batch.membership[1, statistics.labels.get(("domain", "bad"), 0)].nonzero()[:, 0].tolist()
        own = (statistics.widths == model.widths) == (module == "language")
        if ("domain", "bad") in statistics.labels and row and own and layer == 0:
            rows, activation = statistics._batch.rows, activation.clone()
            positions = activation.reshape(rows, -1, activation.shape[-1])
            positions[row, next(run.start for run in statistics._batch.token_spans if run.row == row[0]), 3] = number
        add(statistics, layer, activation, opened)

    monkeypatch.setattr(shard.TokenStatistics, "add", spoil)
    tables = analyse(model, found, batch_size=12, module=module)
    (row,) = tables["errors"].to_pylist()
    assert (row["sample_id"], row["stage"]) == ("s4", "score")
    assert row["message"].endswith("activations of 1 neuron")
    assert finite(tables)
    same(tables, expected)


@pytest.mark.parametrize("score", ["gradient", "effect", "activation"])
def test_every_score_is_looked_at(open_model, monkeypatch, score):
    model = open_model("llava")
    spoilt(monkeypatch, {"s1"}, np.nan)
    tables = analyse(model, samples(4), score=score)
    assert stages(tables) == {("s1", "score")}
    assert finite(tables)
