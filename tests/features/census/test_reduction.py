"""Sums by concept do not depend on how occurrences were cut, and what is certified is right. Numbers are whole."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import InputError
from mmray.features.census import spill
from mmray.features.census.concept_merge import ConceptMerge, ConceptScores
from mmray.features.census.overflow import Overflow
from mmray.features.census.ranking import (
    MIN_OCCURRENCES,
    TOP_RANKS,
    certified_counts,
    neuron_names,
    rank_concept,
    ranking_table,
    selective_scores,
    specific_scores,
)
from mmray.features.census.reduction import (
    ALL_KEPT,
    KEPT_OF_MORE,
    ConceptSums,
    candidates_kept,
    highest,
)
from mmray.features.census.tables import SUMS
from mmray.runs.tables import from_bytes, to_bytes
from tests.support.stores import FullFile

WIDTHS = (3, 2, 3)
NEURONS = sum(WIDTHS)
TEXTS = pa.table({"tokens": [["a"]] * NEURONS, "suppressed": [["b"]] * NEURONS})

NUMBERS = st.lists(st.integers(-6, 6), min_size=NEURONS, max_size=NEURONS)
OCCURRENCE = st.tuples(st.sampled_from(["dog", "cat", "owl"]), NUMBERS, NUMBERS)
OCCURRENCES = st.lists(OCCURRENCE, min_size=1, max_size=14)
CUTS = st.lists(st.integers(0, 14), max_size=7).map(sorted)
REALS = st.lists(
    st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.1, -0.1, 1 / 3]), min_size=NEURONS, max_size=NEURONS
)
REAL_OCCURRENCES = st.lists(st.tuples(st.sampled_from(["dog", "cat", "owl"]), REALS, REALS), min_size=1, max_size=14)


def cut(items, cuts):
    edges = [0, *(min(place, len(items)) for place in cuts), len(items)]
    return [items[first:last] for first, last in pairwise(edges)]


def shard(occurrences, cuts=(), kept=NEURONS, room=1000, disk=1000, expected=()):
    """Return the tables of a shard whose occurrences came in batches, as they come back from storage."""
    sums = ConceptSums(WIDTHS, kept)
    sums.room, sums.room_on_disk = room, disk
    sums.expected.update(concept for concept, _, _ in expected)
    for batch in cut(occurrences, cuts):
        if batch:
            concepts, scores, activation = zip(*batch, strict=True)
            layers = [torch.tensor(part, dtype=torch.float32).split(WIDTHS, dim=1) for part in (scores, activation)]
            sums.add(concepts, *layers)
    return [from_bytes(to_bytes(table)) for table in sums.tables()]


@dataclass
class Merged:
    """A merge, and the sums of its concepts by name."""

    merge: ConceptMerge
    scores: dict[str, ConceptScores]

    def table(self, concept):
        """Return the concept's rows of `rankings`."""
        return ranking_table(
            [rank_concept(concept, self.scores[concept], self.merge)], WIDTHS, neuron_names(WIDTHS), TEXTS
        )

    def certified(self, concept):
        """Return for each of the concept's neurons whether its rank by score is certain."""
        scores = self.scores[concept]
        return scores.certified(np.arange(len(scores.neuron)))


def merge(shards, cuts=()):
    merged = ConceptMerge(NEURONS, cuts)
    for concepts, totals in shards:
        merged.add(concepts, totals)
    return Merged(merged, {name: add_up() for concepts in merged.ranges() for name, add_up in concepts})


def by_hand(occurrences):
    """Return count and sums (score, square, activation) of each concept, and the sum of all scores."""
    sums = defaultdict(lambda: np.zeros((3, NEURONS)))
    counts = defaultdict(int)
    for concept, scores, activation in occurrences:
        counts[concept] += 1
        sums[concept] += np.stack([scores, np.square(scores), activation])
    return counts, sums, np.sum([scores for _, scores, _ in occurrences], axis=0)


def facts(merged):
    """Return all that a merge knows, to compare."""
    found = {}
    for concept, scores in merged.scores.items():
        arrays = (scores.neuron, scores.score, scores.squares, scores.activation, scores.exact)
        found[concept] = (scores.n, scores.left_out, *(array.tolist() for array in arrays))
        found[concept] += (merged.certified(concept).tolist(), merged.table(concept).to_pylist())
    return found, merged.merge.n, (merged.merge.total.tolist(), merged.merge.total_squares.tolist())


@pytest.mark.slow
@given(OCCURRENCES, CUTS, CUTS)
def test_sums_are_those_of_all_occurrences_however_they_are_cut(occurrences, shards, batches):
    merged = merge([shard(part, batches) for part in cut(occurrences, shards)])
    counts, sums, total = by_hand(occurrences)
    assert set(merged.scores) == set(counts)
    assert merged.merge.n == len(occurrences)
    assert merged.merge.total.tolist() == total.tolist()
    for concept, n in counts.items():
        scores = merged.scores[concept]
        assert scores.n == n
        assert scores.neuron.tolist() == list(range(NEURONS))
        assert np.array_equal([scores.score, scores.squares, scores.activation], sums[concept])
        # Every neuron is kept: every rank is certain.
        assert scores.exact.all()
        assert merged.certified(concept).all()
        assert scores.left_out == -np.inf


RANGES = st.lists(st.sampled_from(["a", "cat", "dig", "dog", "owl", "zoo"]), unique=True).map(sorted)


@pytest.mark.slow
@given(OCCURRENCES, CUTS, st.integers(1, NEURONS), RANGES, st.integers(1, 10_000), st.randoms(use_true_random=False))
def test_shards_merge_in_any_order_and_in_any_ranges(occurrences, cuts, kept, ranges, spilled, random):
    shards = [shard(part, kept=kept) for part in cut(occurrences, cuts)]
    expected = facts(merge(shards))
    for _ in range(3):
        random.shuffle(shards)
        with patch.object(spill, "SPILLED", spilled):
            assert facts(merge(shards, ranges)) == expected


@pytest.mark.slow
@given(OCCURRENCES | REAL_OCCURRENCES, CUTS, st.integers(1, NEURONS), RANGES, st.integers(1, 10_000))
def test_ranges_change_no_digit_of_a_sum(occurrences, cuts, kept, ranges, spilled):
    shards = [shard(part, kept=kept) for part in cut(occurrences, cuts)]
    with patch.object(spill, "SPILLED", spilled):
        assert facts(merge(shards, ranges)) == facts(merge(shards))


@given(REAL_OCCURRENCES, CUTS)
def test_shards_are_added_in_their_order(occurrences, cuts):
    shards = [shard(part) for part in cut(occurrences, cuts)]
    sums = defaultdict(lambda: np.zeros(NEURONS))
    for concepts, _ in shards:
        for row in concepts.to_pylist():
            sums[row["concept"]] += row["score"]
    for concept, scores in merge(shards).scores.items():
        assert scores.score.tolist() == sums[concept].tolist()


@given(OCCURRENCES, CUTS, st.integers(1, NEURONS), st.integers(1, 4), st.integers(0, 3))
def test_what_is_kept_of_some_bounds_what_is_not(occurrences, cuts, kept, room, disk):
    merged = merge([shard(part, kept=kept, room=room, disk=disk) for part in cut(occurrences, cuts)])
    _, sums, total = by_hand(occurrences)
    assert merged.merge.total.tolist() == total.tolist()
    for concept, (truth, squares, activation) in sums.items():
        scores = merged.scores[concept]
        exact = scores.neuron[scores.exact]
        assert scores.score[scores.exact].tolist() == truth[exact].tolist()
        assert scores.squares[scores.exact].tolist() == squares[exact].tolist()
        assert scores.activation[scores.exact].tolist() == activation[exact].tolist()
        assert (scores.lower <= truth[scores.neuron]).all()
        assert (scores.upper >= truth[scores.neuron]).all()
        outside = np.setdiff1d(np.arange(NEURONS), scores.neuron)
        assert (truth[outside] <= scores.left_out).all()
        assert len(scores.neuron) >= min(kept, NEURONS)


@given(
    st.lists(st.lists(st.integers(-3, 3) | st.sampled_from([0.1, -0.0]), min_size=9, max_size=9), min_size=1), st.data()
)
def test_the_highest_are_those_of_a_stable_sort(rows, data):
    scores, kept = torch.tensor(rows, dtype=torch.float64), data.draw(st.integers(1, 8))
    ordered = scores.sort(dim=1, descending=True, stable=True)
    neurons, bound = highest(scores, kept)
    assert neurons.tolist() == ordered.indices[:, :kept].sort(dim=1).values.tolist()
    assert bound.tolist() == ordered.values[:, kept].tolist()


@given(OCCURRENCES, CUTS, st.integers(1, NEURONS), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_a_shard_with_little_room_does_not_depend_on_batches(occurrences, batches, kept, room, disk, known):
    options = {"kept": kept, "room": room, "disk": disk, "expected": occurrences if known else ()}
    for table, other in zip(shard(occurrences, batches, **options), shard(occurrences, **options), strict=True):
        assert table.equals(other)


@given(REAL_OCCURRENCES, CUTS)
def test_sums_do_not_depend_on_batches_to_the_last_digit(occurrences, batches):
    for table, other in zip(shard(occurrences, batches), shard(occurrences), strict=True):
        assert table.equals(other)


@given(OCCURRENCES, st.integers(1, NEURONS))
def test_a_concept_is_open_until_its_last_occurrence(occurrences, kept):
    occurrences = sorted(occurrences)
    # One concept at a time needs one row of room.
    found, enough = (shard(occurrences, kept=kept, room=room, expected=occurrences) for room in (1, 1000))
    for table, other in zip(found, enough, strict=True):
        assert table.equals(other)


@given(OCCURRENCES, CUTS, st.integers(1, NEURONS), st.integers(1, 4), st.booleans())
def test_room_changes_no_sum(occurrences, batches, kept, room, known):
    # Whether the sums of a concept waited on disk or not: it has one row, over all its occurrences.
    options = {"cuts": batches, "kept": kept, "expected": occurrences if known else ()}
    for table, other in zip(shard(occurrences, room=room, **options), shard(occurrences, **options), strict=True):
        assert table.equals(other)


@given(REAL_OCCURRENCES, st.integers(1, 4))
def test_sums_come_back_from_disk_to_the_last_digit(occurrences, room):
    rows, _ = shard(occurrences, room=room)
    for row in rows.to_pylist():
        own = [np.array(values, np.float32) for name, *values in occurrences if name == row["concept"]]
        assert row["n"] == len(own)
        exact = [
            [sum((Fraction(float(x)) for x in column), Fraction(0)) for column in part.T]
            for part in np.swapaxes(own, 0, 1)
        ]
        np.testing.assert_allclose(row["score"], np.array(exact[0], float), rtol=1e-13, atol=1e-7)
        np.testing.assert_allclose(row["activation"], np.array(exact[1], np.float32), rtol=1e-6, atol=1e-3)


def test_a_concept_that_is_complete_never_goes_to_disk(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    names = ["dog", "dog", "cat", "owl", "owl", "fox"]
    occurrences = [(name, [1] * NEURONS, [1] * NEURONS) for name in names]
    rows, _ = shard(occurrences, room=1, expected=occurrences)
    assert dict(zip(*(rows[name].to_pylist() for name in ("concept", "n")), strict=True)) == Counter(names)


def test_a_full_disk_of_a_worker_is_named(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", FullFile)
    occurrences = [(name, [1] * NEURONS, [1] * NEURONS) for name in ("dog", "cat", "dog", "cat")]
    with pytest.raises(InputError, match="no room for sums of concepts; set TMPDIR"):
        shard(occurrences, room=1, expected=occurrences)


def test_what_is_needed_least_makes_room():
    names = ["dog", "cat", "owl", "dog", "fox", "cat", "owl", "dog"]
    occurrences = [(name, [1] * NEURONS, [1] * NEURONS) for name in names]
    with patch.object(Overflow, "put", autospec=True, side_effect=Overflow.put) as put:
        shard(occurrences, room=2, expected=occurrences)
    # The owl needs room: a cat is to come, but two dogs. Then the fox does: it takes the owl's, the older of two. When
    # the cat and the owl come back, the fox and the cat are complete.
    assert [call.args[1] for call in put.call_args_list] == [["cat"], ["owl"]]


def test_what_finds_no_room_on_disk_makes_another_row():
    names = ["dog", "cat", "owl", "dog", "fox", "cat", "owl", "dog"]
    occurrences = [(name, [1] * NEURONS, [1] * NEURONS) for name in names]
    enough, one, none = (
        shard(occurrences, room=1, disk=disk, expected=occurrences)[0]["concept"].to_pylist() for disk in (3, 1, 0)
    )
    assert enough == sorted(set(names))
    assert set(one) == set(none) == set(names)
    assert len(enough) < len(one) < len(none) == len(names)


def true_ranks(truth):
    order = np.lexsort((np.arange(len(truth)), -truth))
    ranks = np.empty(len(truth), int)
    ranks[order] = np.arange(1, len(truth) + 1)
    return ranks


@given(OCCURRENCES, CUTS, st.integers(1, NEURONS), st.integers(1, 4))
def test_a_certified_rank_is_the_true_one(occurrences, cuts, kept, room):
    merged = merge([shard(part, kept=kept, room=room) for part in cut(occurrences, cuts)])
    counts, sums, _ = by_hand(occurrences)
    for concept, (truth, squares, activation) in sums.items():
        table = merged.table(concept)
        ranks = true_ranks(truth)
        for row in table.to_pylist():
            neuron = sum(WIDTHS[: row["layer"]]) + row["unit"]
            if not row["certified"]:
                continue
            n = counts[concept]
            assert row["rank"] == ranks[neuron]
            if not row["exact"]:
                continue
            assert row["score"] == truth[neuron] / n
            assert row["activation"] == activation[neuron] / n
            assert row["tokens"] == ["b" if row["activation"] < 0 else "a"]
            assert abs(row["score_std"] - np.sqrt(squares[neuron] / n - (truth[neuron] / n) ** 2)) < 1e-6
        assert table["rank"].to_pylist() == list(range(1, len(table) + 1))
        if kept == NEURONS:
            assert all(table["certified"].to_pylist())
            assert len(table) == NEURONS


@given(REAL_OCCURRENCES, CUTS, st.integers(1, NEURONS), st.integers(1, 4))
def test_bounds_hold_to_the_last_digit(occurrences, cuts, kept, room):
    merged = merge([shard(part, kept=kept, room=room) for part in cut(occurrences, cuts)])
    for concept in merged.scores:
        own = [np.float32(scores).astype(float) for name, scores, _ in occurrences if name == concept]
        truth = np.array([Fraction(0)] * NEURONS)
        for scores in own:
            truth += [Fraction(value) for value in scores]
        scores = merged.scores[concept]
        for neuron, exact, *bounds in zip(scores.neuron, scores.exact, scores.lower, scores.upper, strict=True):
            lower, upper = bounds
            assert exact or Fraction(lower) <= truth[neuron] <= Fraction(upper)
        for neuron in np.setdiff1d(np.arange(NEURONS), scores.neuron):
            assert Fraction(scores.left_out) >= truth[neuron]


ORDERS = {
    "certified": ("rank", lambda score, others, squares: score),
    "certified_specific": ("specific_rank", lambda score, others, squares: score - np.maximum(0, others)),
    "certified_selective": ("selective_rank", lambda score, others, squares: score - np.sqrt(squares)),
}


@pytest.mark.slow
@pytest.mark.parametrize("certificate", ORDERS)
@given(OCCURRENCES | REAL_OCCURRENCES, CUTS, st.integers(1, NEURONS), st.integers(1, 4))
def test_no_certificate_of_any_order_is_wrong(certificate, occurrences, cuts, kept, room):
    merged = merge([shard(part, kept=kept, room=room) for part in cut(occurrences, cuts)])
    rank, order = ORDERS[certificate]
    for concept in merged.scores:
        own, others = (
            np.array([np.float32(scores) for name, scores, _ in occurrences if (name == concept) is wanted], float)
            for wanted in (True, False)
        )
        others = others.reshape(-1, NEURONS) if len(others) else np.zeros((1, NEURONS))
        truth = order(own.mean(0), others.mean(0), np.square(others).mean(0))
        # Neurons that rounding can't tell apart have no true order among themselves.
        near = 1e-9 * max(1.0, np.abs(own).max(), np.abs(others).max())
        table = merged.table(concept)
        for row in table.to_pylist():
            if row[certificate]:
                value = truth[sum(WIDTHS[: row["layer"]]) + row["unit"]]
                assert (truth > value + near).sum() < row[rank] <= (truth >= value - near).sum()
        if kept == NEURONS:
            assert all(table[certificate].to_pylist())


def test_a_neuron_left_out_that_is_first_by_specific_is_no_secret():
    # By score, neuron 0 leads; it serves owls as well. Neuron 7, which no shard keeps, is the dog's own.
    dog, owl = [9, 6, 6, 0, 0, 0, 0, 5], [9, 6, 6, 0, 0, 0, 0, 0]
    shards = [shard([("dog", dog, dog), ("owl", owl, owl)], kept=3) for _ in range(4)]
    rows = {row["neuron"]: row for row in merge(shards).table("dog").to_pylist()}
    assert rows["L0.u0"]["certified"]
    assert "L2.u2" not in rows
    assert not any(row["certified_specific"] or row["certified_selective"] for row in rows.values())
    # Without the owls' part in neuron 0 it is first in every order.
    shards = [shard([("dog", dog, dog), ("owl", [0, *owl[1:]], owl)], kept=3) for _ in range(4)]
    rows = {row["neuron"]: row for row in merge(shards).table("dog").to_pylist()}
    assert all(rows["L0.u0"][certificate] for certificate in ORDERS)
    assert {rows["L0.u0"][rank] for rank, _ in ORDERS.values()} == {1}


@pytest.mark.slow
@given(OCCURRENCES, CUTS, st.integers(1, NEURONS))
def test_the_share_of_certified_ranks_is_that_of_frequent_concepts(occurrences, cuts, kept):
    merged = merge([shard(part, kept=kept) for part in cut(occurrences, cuts)])
    tables = [merged.table(concept) for concept in merged.scores]
    found = [
        row["certified"]
        for table in tables
        for row in table.to_pylist()
        if row["n"] >= MIN_OCCURRENCES and row["rank"] <= TOP_RANKS
    ]
    assert certified_counts(pa.concat_tables(tables)) == (sum(found), len(found))


def test_the_first_ranks_are_certified_where_they_lead_by_far():
    occurrences = [("dog", [9, 1, 0, 0, 7, 0, 0, -1], [0] * NEURONS)] * 5
    merged = merge([shard([occurrence], kept=3) for occurrence in occurrences])
    scores = merged.scores["dog"]
    assert dict(zip(scores.neuron.tolist(), merged.certified("dog").tolist(), strict=True)) == {
        0: True,
        1: True,
        4: True,
    }


def test_a_sum_that_another_may_reach_is_not_certified():
    # Neuron 0 comes to 6 as well, and stands before neuron 1; what is known of it is 5, and 1 that was left out.
    shards = [[5, 3, 0, 0, 0, 0, 0, 0], [1, 3, 2, 0, 0, 0, 0, 0]]
    merged = merge([shard([("dog", scores, [0] * NEURONS)], kept=2) for scores in shards])
    scores = merged.scores["dog"]
    certified = dict(zip(scores.neuron.tolist(), merged.certified("dog").tolist(), strict=True))
    assert certified[1] is False
    assert certified[0] is False


@given(OCCURRENCES)
def test_specific_takes_away_what_other_nouns_get_if_it_is_positive(occurrences):
    merged = merge([shard(occurrences)])
    counts, sums, total = by_hand(occurrences)
    for concept, n in counts.items():
        scores = merged.scores[concept]
        truth = sums[concept][0]
        others = len(occurrences) - n
        for neuron, found in enumerate(specific_scores(scores, merged.merge.total, merged.merge.n)):
            elsewhere = (total[neuron] - truth[neuron]) / others if others else 0.0
            assert found == truth[neuron] / n - max(0.0, elsewhere)


@given(OCCURRENCES)
def test_selective_takes_away_the_mean_square_elsewhere(occurrences):
    merged = merge([shard(occurrences)])
    _, sums, _ = by_hand(occurrences)
    for concept, (truth, _, _) in sums.items():
        scores = merged.scores[concept]
        others = [np.square(values) for name, values, _ in occurrences if name != concept]
        elsewhere = np.mean(others, axis=0) if others else np.zeros(NEURONS)
        found = selective_scores(scores, merged.merge.total_squares, merged.merge.n)
        np.testing.assert_allclose(found, truth / scores.n - np.sqrt(elsewhere), rtol=1e-12, atol=1e-12)


def test_a_shard_without_occurrences_adds_nothing():
    occurrences = [("dog", [1] * NEURONS, [2] * NEURONS)]
    for kept in (2, NEURONS):
        alone = facts(merge([shard(occurrences, kept=kept)]))
        assert facts(merge([shard([], kept=kept), shard(occurrences, kept=kept), shard([], kept=kept)])) == alone
        assert facts(merge([shard([], kept=kept)])) == ({}, 0, ([0.0] * NEURONS, [0.0] * NEURONS))


def test_as_many_neurons_are_kept_as_are_asked_for():
    assert candidates_kept(None, 8192) == 8192
    assert candidates_kept(None, ALL_KEPT) == ALL_KEPT
    assert candidates_kept(None, ALL_KEPT + 1) == KEPT_OF_MORE
    assert candidates_kept(10, 8192) == 10
    assert candidates_kept(10_000, 8192) == 8192


def test_many_concepts_have_room():
    names = [f"noun {number}" for number in range(150)]
    occurrences = [(name, [number % 7] * NEURONS, [1] * NEURONS) for number, name in enumerate(names)]
    merged = merge([shard(occurrences, cuts=(1, 70, 71))])
    assert sorted(merged.scores) == sorted(names)
    for number, name in enumerate(names):
        assert merged.scores[name].score.tolist() == [number % 7] * NEURONS


@given(OCCURRENCES, st.integers(1, NEURONS))
def test_parts_of_earlier_versions_are_merged(occurrences, kept):
    concepts, totals = shard(occurrences, kept=kept)
    earlier = concepts
    for name in SUMS:
        column = concepts[name]
        raw = [
            None if row is None else np.array(row, column.type.value_type.to_pandas_dtype()).tobytes()
            for row in column.to_pylist()
        ]
        earlier = earlier.set_column(earlier.column_names.index(name), name, pa.array(raw, pa.large_binary()))
    assert facts(merge([(earlier, totals)])) == facts(merge([(concepts, totals)]))
