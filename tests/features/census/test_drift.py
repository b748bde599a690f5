"""Drift between two runs: what its measures must be at both ends, and in between by the definition."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import InputError
from mmray.features.census.drift import compare, rank_biased_overlap, spearman
from mmray.features.census.tables import TABLES
from mmray.features.census.view import drift as terminal_drift
from mmray.runs.run import Run
from tests.support.terminal import shown

RANKINGS = st.lists(st.sampled_from("abcdefghijklmnop"), unique=True, max_size=16)


@dataclass
class Kept:
    """Tables without a folder."""

    info: dict[str, Any]
    tables: dict[str, pa.Table]

    def table(self, name: str) -> pa.Table:
        return self.tables[name]


def rankings(*concepts: tuple[str, list[int]]) -> pa.Table:
    """Concepts with their neurons' units, highest first."""
    rows = [
        {"concept": concept, "rank": rank, "specific_rank": len(units) + 1 - rank, "neuron": f"L0.u{unit}", "n": 3}
        | {"score": 10.0 - rank, "specific": float(rank)}
        for concept, units in concepts
        for rank, unit in enumerate(units, 1)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["rankings"])


def neurons(mean: list[float], active: list[int], std: float = 2.0) -> pa.Table:
    rows = [
        {"neuron": f"L0.u{unit}", "n_tokens": 100, "n_active": active[unit], "mean": mean[unit], "std": std}
        for unit in range(len(mean))
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["neurons"])


def kept(*concepts: tuple[str, list[int]], digest: str = "m", **of_neurons: Any) -> Kept:
    tables = {"rankings": rankings(*concepts), "neurons": neurons(**({"mean": [0, 0], "active": [5, 5]} | of_neurons))}
    return Kept({"model": {"widths": [16]}, "digests": {"model": digest}}, tables)


def naive_overlap(first: list[str], second: list[str], p: float) -> float:
    depth = min(len(first), len(second))
    agreement = [len(set(first[:d]) & set(second[:d])) / d for d in range(1, depth + 1)]
    tail = agreement[-1] * p**depth
    return tail + (1 - p) / p * sum(a * p**d for d, a in enumerate(agreement, 1))


@given(RANKINGS, RANKINGS, st.sampled_from([0.5, 0.9, 0.98]))
def test_overlap_is_what_its_definition_says(first: list[str], second: list[str], p: float) -> None:
    found = rank_biased_overlap(first, second, p)
    assert found == pytest.approx(rank_biased_overlap(second, first, p))
    assert -1e-9 <= found <= 1 + 1e-9
    assert rank_biased_overlap(first, first, p) == pytest.approx(1)
    if first and second:
        assert found == pytest.approx(naive_overlap(first, second, p))


def test_overlap_of_lists_with_nothing_in_common() -> None:
    assert rank_biased_overlap(list("abc"), list("xyz")) == 0
    # A difference at the top weighs more than one further down.
    assert rank_biased_overlap(list("abcde"), list("bacde")) < rank_biased_overlap(list("abcde"), list("abced"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_rank_correlation_by_pandas(pairs: list[tuple[int, int]]) -> None:
    pandas = pytest.importorskip("pandas")
    first, second = (np.array(values, float) for values in zip(*pairs, strict=True))
    found = spearman(first, second)
    ranks = [pandas.Series(values).rank() for values in (first, second)]
    expected = ranks[0].corr(ranks[1]) if len(set(first)) > 1 and len(set(second)) > 1 else None
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_run_has_not_drifted_from_itself(run: Run) -> None:
    drift = compare(run, run)
    assert drift.drift == pytest.approx(0, abs=1e-12)
    assert (drift.new, drift.vanished, drift.same_model) == ([], [], True)
    assert sorted(drift.concepts["concept"].to_pylist()) == sorted(run.concepts)
    assert drift.concepts["n_before"].equals(drift.concepts["n_after"])
    assert set(drift.concepts["jaccard"].to_pylist()) == {1.0}
    np.testing.assert_allclose([value for value in drift.concepts["spearman"].to_pylist() if value is not None], 1)
    assert set(drift.neurons["shift"].to_pylist()) == {0.0}
    assert len(drift.neurons) == len(run.table("neurons"))


def test_what_has_come_and_gone() -> None:
    before = kept(("dog", [1, 2, 3]), ("cat", [4, 5, 6]))
    after = kept(("dog", [1, 2, 3]), ("owl", [4, 5, 6]), digest="other")
    drift = compare(before, after)
    assert (drift.new, drift.vanished, drift.same_model) == (["owl"], ["cat"], False)
    assert drift.drift == pytest.approx(0)
    assert compare(before, kept(("owl", [1]))).drift == 1
    assert compare(kept(), kept()).drift == 0


def test_the_least_alike_come_first_and_drift_is_their_mean() -> None:
    before = kept(("dog", [1, 2, 3, 4]), ("cat", [1, 2, 3, 4]), ("owl", [1, 2, 3, 4]))
    after = kept(("dog", [1, 2, 3, 4]), ("cat", [5, 6, 7, 8]), ("owl", [2, 1, 3, 5]))
    drift = compare(before, after, k=4)
    assert drift.concepts["concept"].to_pylist() == ["cat", "owl", "dog"]
    assert drift.concepts["jaccard"].to_pylist() == [0, pytest.approx(3 / 5), 1]
    overlaps = drift.concepts["overlap"].to_pylist()
    # The dog is as it was: no part of the drift.
    assert (drift.unchanged, drift.concepts["changed"].to_pylist()) == (1, [True, True, False])
    assert drift.drift == pytest.approx(1 - np.mean(overlaps[:2]))
    # Only the highest k count, and the order is that which was asked for.
    assert compare(before, after, k=1).concepts["jaccard"].to_pylist() == [0, 0, 1]
    reverse = compare(before, after, k=1, by="specific").concepts.to_pylist()
    assert {row["concept"]: row["jaccard"] for row in reverse} == {"cat": 0, "dog": 1, "owl": 0}


def test_concepts_without_new_occurrences_do_not_dilute_the_drift() -> None:
    grown, still = ("dog", [1, 2, 3]), [(f"c{number}", [1, 2, 3]) for number in range(29)]
    before, after = kept(grown, *still), kept(("dog", [3, 2, 1]), *still)
    alone = compare(kept(grown), kept(("dog", [3, 2, 1])))
    together = compare(before, after)
    assert together.drift == alone.drift > 0.1
    assert (together.unchanged, alone.unchanged) == (29, 0)
    # Others' occurrences change `specific`, but a concept of the same scores has none of its own.
    moved = after.tables["rankings"]
    specific = pa.array(np.arange(len(moved), 0, -1), pa.float64())
    after.tables["rankings"] = moved.set_column(moved.schema.get_field_index("specific"), "specific", specific)
    assert compare(before, after, by="specific").unchanged == 29
    # One more occurrence is a change, whatever the ranking.
    counts = pa.array([4 if name == "c0" else 3 for name in moved["concept"].to_pylist()], pa.int64())
    after.tables["rankings"] = moved.set_column(moved.schema.get_field_index("n"), "n", counts)
    assert compare(before, after).unchanged == 28
    text = "\n".join(shown(terminal_drift(together), 100))
    assert "mean over 1 concepts" not in text
    assert "mean over 1 concept," in text
    assert "30 in both, 29 without new occurrences" in text
    assert "c0" not in text


def test_activity_shifts_are_in_standard_deviations() -> None:
    before = kept(mean=[0.0, 1.0, 0.0], active=[10, 20, 30])
    after = kept(mean=[0.0, -3.0, 1.0], active=[10, 40, 30])
    shifted = compare(before, after).neurons.to_pylist()
    assert [row["neuron"] for row in shifted] == ["L0.u1", "L0.u2", "L0.u0"]
    assert [row["shift"] for row in shifted] == [pytest.approx(-2), pytest.approx(0.5), 0]
    assert (shifted[0]["active_before"], shifted[0]["active_after"]) == (0.2, 0.4)


def test_what_cannot_be_compared() -> None:
    other = kept()
    other.info = {**other.info, "model": {"widths": [8, 8]}}
    with pytest.raises(InputError, match="models have different shapes"):
        compare(kept(), other)
    with pytest.raises(InputError, match="unknown order 'share'; choose from score, specific"):
        compare(kept(), kept(), by="share")


def test_a_summary_is_plain(run: Run) -> None:
    import json

    summary = compare(run, run).summary(3)
    assert len(json.loads(json.dumps(summary))["neurons"]) == 3
    assert set(summary) == {field.name for field in dataclasses.fields(compare(run, run))}
