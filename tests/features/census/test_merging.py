"""A run's tables are sums, maxima and top-k of its shards' parts, in whatever order they come."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.data.samples import Sample
from mmray.features.census import concept_rankings, neuron_sums
from mmray.features.census.activity import without_repeats
from mmray.features.census.merging import RunMerge
from mmray.features.census.neuron_sums import Examples, Samples
from mmray.features.census.ranking import locate_index
from mmray.features.census.tables import PARTS, TABLES
from mmray.neurons.tables import EXAMPLES
from tests.support.samples import CAPTIONS, analyse, merged, picture, png, sample, samples

TOP = 4


@pytest.fixture(scope="module")
def shards(open_model):
    found = samples(language="en", domain="photo")[:8] + samples(12, language="es")[8:]
    model = open_model("llava")
    return [
        analyse(model, found[first:last], shard_id=shard, top_k=TOP)
        for shard, (first, last) in enumerate([(0, 5), (5, 6), (6, 12)])
    ]


@pytest.fixture(scope="module")
def tables(open_model, shards):
    return merged(open_model("llava"), shards, top_k=TOP)


def test_tables_have_the_schemas_that_readers_know(tables):
    assert tables.keys() == {"rankings", "concepts", "neuron_concepts", "neurons", "activity", "examples"}
    for name, table in tables.items():
        assert table.schema.equals(TABLES[name])
        assert len(table) > 0


def test_appended_tables_are_the_shards_rows(open_model, shards):
    texts = pa.array([["a"]] * 96, pa.list_(pa.string()))
    merge = RunMerge(open_model("llava").widths, pa.table({"tokens": texts, "suppressed": texts}), TOP)
    for shard in shards:
        rows = merge.add(shard.__getitem__)
        assert rows.keys() == {"captions", "occurrences", "errors"}
        assert all(table.equals(shard[name]) for name, table in rows.items())


def test_activity_is_the_sum_over_shards(shards, tables):
    expected = defaultdict(lambda: np.zeros((4, 96)))
    for shard in shards:
        for row in shard["activity"].to_pylist():
            key = (row["label_kind"], row["label"], row["modality"])
            expected[key] += [[row["n_tokens"]] * 96, row["n_active"], row["sum"], row["sum_squares"]]
    found = defaultdict(dict)
    for row in tables["activity"].to_pylist():
        numbers = [row["n_tokens"], row["n_active"], row["sum"], row["sum_squares"]]
        found[row["label_kind"], row["label"], row["modality"]][48 * row["layer"] + row["unit"]] = numbers
    assert found.keys() == expected.keys()
    assert {key[:2] for key in found} == {("all", "all"), ("language", "en"), ("language", "es"), ("domain", "photo")}
    for key, numbers in expected.items():
        assert sorted(found[key]) == list(range(96))
        np.testing.assert_allclose([found[key][neuron] for neuron in range(96)], numbers.T, rtol=1e-12)


def test_what_repeats_the_activity_of_all_is_written_once(open_model, shards, tables):
    written = [shard | {"activity": without_repeats(shard["activity"])} for shard in shards]
    # The samples of the first two shards have the same labels, those of the last do not.
    left = [shard["activity"]["sum"].is_valid().to_pylist().count(True) for shard in written]
    assert left == [2, 2, len(shards[2]["activity"])]
    assert [len(shard["activity"]) for shard in shards[:2]] == [6, 6]
    assert merged(open_model("llava"), written, top_k=TOP) == tables


def test_neurons_are_described_over_all_tokens(shards, tables):
    rows = tables["neurons"].to_pylist()
    assert [row["neuron"] for row in rows] == [f"L{layer}.u{unit}" for layer in (0, 1) for unit in range(48)]
    of_all = [row for shard in shards for row in shard["activity"].to_pylist() if row["label_kind"] == "all"]
    tokens = sum(row["n_tokens"] for row in of_all)
    active, total, squares = (
        np.sum([row[name] for row in of_all], axis=0) for name in ("n_active", "sum", "sum_squares")
    )
    assert {row["n_tokens"] for row in rows} == {tokens}
    assert [row["n_active"] for row in rows] == active.tolist()
    np.testing.assert_allclose([row["mean"] for row in rows], total / tokens)
    np.testing.assert_allclose([row["std"] for row in rows], np.sqrt(squares / tokens - (total / tokens) ** 2))
    # Only text and image tokens of the example samples are counted, and each extreme is one of them.
    for sign, name, best in ((1, "max", np.maximum), (-1, "min", np.minimum)):
        firsts = [
            row["activation"]
            for shard in shards
            for row in shard["examples"].to_pylist()
            if (row["sign"], row["rank"]) == (sign, 1)
        ]
        assert [row[name] for row in rows] == best.reduce(np.array(firsts, np.float32)).tolist()


def test_a_neuron_serves_the_concepts_in_whose_top_it_is(tables):
    served = Counter(row["neuron"] for row in tables["rankings"].to_pylist() if row["rank"] <= TOP)
    for row in tables["neurons"].to_pylist():
        assert row["n_concepts"] == served[row["neuron"]]


def test_examples_are_the_most_extreme_of_all_shards(shards, tables):
    expected = defaultdict(list)
    for shard in shards:
        names = shard["captions"]["sample_id"].to_pylist()
        for row in shard["examples"].to_pylist():
            for neuron in range(96):
                entry = (row["activation"][neuron], names[row["sample"][neuron]], row["position"][neuron])
                expected[row["sign"], neuron].append(entry)
    found = defaultdict(list)
    for row in sorted(tables["examples"].to_pylist(), key=lambda row: row["rank"]):
        entry = (row["activation"], row["sample_id"], row["position"])
        found[row["sign"], 48 * row["layer"] + row["unit"]].append(entry)
        assert row["rank"] == len(found[row["sign"], 48 * row["layer"] + row["unit"]])
    assert found.keys() == expected.keys()
    for (sign, neuron), entries in expected.items():
        assert len(entries) == 5 + 1 + 5
        assert found[sign, neuron] == sorted(entries, key=lambda entry: -sign * entry[0])[:EXAMPLES]


def test_shares_count_the_occurrences_in_whose_top_a_neuron_is(shards, tables):
    hits, totals = Counter(), Counter()
    for shard in shards:
        for row in shard["occurrences"].to_pylist():
            totals[row["concept"]] += 1
            assert len(row["neurons"]) == TOP
            hits.update((row["concept"], entry["layer"], entry["unit"]) for entry in row["neurons"])
    for row in tables["rankings"].to_pylist():
        assert row["n"] == totals[row["concept"]]
        assert row["share"] == hits[row["concept"], row["layer"], row["unit"]] / totals[row["concept"]]


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_the_order_of_shards_changes_nothing(open_model, shards, tables, order):
    other = merged(open_model("llava"), [shards[place] for place in order], top_k=TOP)
    for name, keys in {
        "rankings": ("concept", "rank"),
        "neurons": ("layer", "unit"),
        "activity": ("label_kind", "label", "modality", "layer", "unit"),
        "examples": ("sign", "layer", "unit", "rank"),
    }.items():
        first, second = (
            {tuple(row[key] for key in keys): row for row in each[name].to_pylist()} for each in (tables, other)
        )
        assert first.keys() == second.keys()
        for key, row in first.items():
            for column, value in row.items():
                # Sums in fp64 of the same numbers in another order.
                expected = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
                assert second[key][column] == expected, (name, key, column)


def test_threads_and_pieces_change_no_table(open_model, shards, tables, monkeypatch):
    assert tables["concepts"]["concept"].to_pylist() == sorted(set(tables["rankings"]["concept"].to_pylist()))
    # One concept per table and few neurons at a time: as many threads as there may be, and the most pieces.
    monkeypatch.setattr(neuron_sums, "BLOCK", 7)
    monkeypatch.setattr(concept_rankings, "TOGETHER", 1)
    monkeypatch.setattr(concept_rankings, "RANKERS", 3)
    monkeypatch.setattr(concept_rankings, "cores", lambda: 3)
    assert merged(open_model("llava"), shards, top_k=TOP) == tables


@pytest.mark.parametrize(("share", "found"), [("3", 3), ("2,1", 2), ("", 5), ("0", 5), ("many", 5)])
def test_a_worker_knows_its_share_of_the_cores(share, found, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", share)
    monkeypatch.setattr(concept_rankings.os, "cpu_count", lambda: 5)
    assert concept_rankings.cores() == found


def test_places_of_neurons_go_through_layers_of_different_width():
    layer, unit = locate_index((3, 1, 2), np.arange(6))
    assert layer.tolist() == [0, 0, 0, 1, 2, 2]
    assert unit.tolist() == [0, 1, 2, 0, 0, 1]


def test_nothing_merged_gives_empty_tables(open_model):
    tables = merged(open_model("llava"), [])
    assert {name: len(table) for name, table in tables.items()} == {
        "rankings": 0,
        "concepts": 0,
        "neuron_concepts": 0,
        "neurons": 96,
        "activity": 0,
        "examples": 0,
    }
    assert PARTS.keys() >= {"concepts", "totals", "activity", "examples"}


def of_few_images() -> list[Sample]:
    """Captions of four images in turns, and two texts without an image."""
    found = [sample(number, CAPTIONS[number], image=png(picture(number % 4))) for number in range(10)]
    return [*found, sample(10, CAPTIONS[10], image=None), sample(11, CAPTIONS[10], image=None)]


def plain(samples, sign):
    """Return the highest activations of a neuron, each of another image, from (image, activation) pairs."""
    best = {}
    for image, activation in samples:
        best[image] = max(sign * activation, best.get(image, -np.inf))
    return sorted(best.values(), reverse=True)[:EXAMPLES]


SEEN = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=24)


@given(SEEN, st.lists(st.integers(0, 24), max_size=5).map(sorted), st.sampled_from([1, -1]), st.randoms())
def test_examples_are_of_different_images_however_shards_are_cut(seen, cuts, sign, random):
    edges = [0, *(min(place, len(seen)) for place in cuts), len(seen)]
    shards = [part for first, last in pairwise(edges) if (part := list(enumerate(seen))[first:last])]
    random.shuffle(shards)
    examples = Examples(sign, 2)
    numbers = np.arange(len(seen))
    captions = Samples(numbers.astype(object), np.array([ord(image) for image, *_ in seen], np.uint64), numbers)
    for part in shards:
        # A shard hands on its highest sample of each of its highest images, as `TokenStatistics` does.
        kept = np.full((EXAMPLES, 2), -sign * np.inf, np.float32)
        samples = np.zeros((EXAMPLES, 2), int)
        for neuron in range(2):
            best = {}
            for number, (image, *activations) in sorted(part, key=lambda each: -sign * each[1][1 + neuron]):
                best.setdefault(image, (activations[neuron], number))
            for rank, (activation, number) in enumerate(list(best.values())[:EXAMPLES]):
                kept[rank, neuron], samples[rank, neuron] = activation, number
        examples.add(kept, samples, np.zeros((EXAMPLES, 2), np.int32), captions)
    for neuron in range(2):
        found = examples.activation[:, neuron]
        found = found[np.isfinite(found)]
        assert (sign * found).tolist() == plain([(image, both[neuron]) for image, *both in seen], sign)
        named = [seen[number] for number in examples.sample_id[: len(found), neuron]]
        assert len({image for image, *_ in named}) == len(named)
        assert [both[neuron] for _, *both in named] == found.tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_texts_that_share_an_id_are_one_example(sign):
    # A shard counts them apart, because they have no image; the merge knows them by their id.
    captions = Samples(
        np.array(["a", "b", "a", "c", "b"], object), np.array([1, 2, 1, 3, 2], np.uint64), np.zeros(5, int)
    )
    examples = Examples(sign, 1)
    for activations in ([6, 5, 4, 3, 2], [9, 8, 7, 1, 0]):
        kept = sign * np.array(activations, np.float32)[:, None]
        examples.add(kept, np.arange(5)[:, None], np.zeros((5, 1), np.int32), captions)
    assert (sign * examples.activation[:3, 0]).tolist() == [9, 8, 3]
    assert not np.isfinite(examples.activation[3:]).any()
    assert examples.sample_id[:3, 0].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("cuts", [(12,), (3, 12), (1, 2, 7, 8, 12)])
def test_captions_of_one_image_are_one_example(open_model, cuts):
    model, found = open_model("llava"), of_few_images()
    shards = [
        analyse(model, found[first:last], shard_id=shard, batch_size=2)
        for shard, (first, last) in enumerate(pairwise([0, *cuts]))
    ]
    images = {row["sample_id"]: row["image"] or row["sample_id"] for s in shards for row in s["captions"].to_pylist()}
    alone = {entry.sample_id: analyse(model, [entry])["examples"].to_pylist() for entry in found}
    examples = defaultdict(list)
    for row in sorted(merged(model, shards)["examples"].to_pylist(), key=lambda row: row["rank"]):
        examples[row["sign"], 48 * row["layer"] + row["unit"]].append(row)
    assert len(examples) == 2 * 96
    for (sign, neuron), rows in examples.items():
        seen = [(images[name], own[0 if sign > 0 else 1]["activation"][neuron]) for name, own in alone.items()]
        expected = plain(seen, sign)
        assert [row["rank"] for row in rows] == list(range(1, len(expected) + 1))
        np.testing.assert_allclose([sign * row["activation"] for row in rows], expected, rtol=1e-4, atol=1e-6)
        assert len({images[row["sample_id"]] for row in rows}) == len(rows)


@pytest.mark.parametrize("cuts", [(12,), (3, 12), (1, 2, 7, 8, 12)])
def test_images_of_a_concept_are_counted_once_over_all_shards(open_model, cuts):
    model, found = open_model("llava"), of_few_images()
    shards = [
        analyse(model, found[first:last], shard_id=shard) for shard, (first, last) in enumerate(pairwise([0, *cuts]))
    ]
    images, expected = {entry.sample_id: entry.image or entry.sample_id for entry in found}, defaultdict(set)
    for shard in shards:
        for row in shard["occurrences"].to_pylist():
            expected[row["concept"]].add(images[row["sample_id"]])
    counts = {(row["concept"], row["n_images"]) for row in merged(model, shards)["rankings"].to_pylist()}
    assert counts == {(concept, len(own)) for concept, own in expected.items()}
    assert any(0 < count < len(found) for _, count in counts)
