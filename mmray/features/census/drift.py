"""Differences between the rankings and activities of two runs, per concept and per neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64
from numpy import ndarray

from mmray.errors import InputError

PERSISTENCE = 0.9
"""Parameter p of rank-biased overlap: with 0.9 the first ten ranks have 86 % of the weight."""
ORDERS = {"score": "rank", "specific": "specific_rank"}
"""Column to compare rankings by → the column with the rank."""

CONCEPTS = pa.schema(
    [
        ("concept", pa.string()),
        ("n_before", pa.int64()),
        ("n_after", pa.int64()),
        ("overlap", pa.float64()),
        ("jaccard", pa.float64()),
        ("spearman", pa.float64()),
        ("changed", pa.bool_()),
    ]
)
"""One row per concept of both runs: occurrences, rank-biased overlap, Jaccard index of the k highest, rank
correlation, and whether the concept has new occurrences."""
ROUNDING = 1e-5
"""Difference of scores, as a fraction of the highest, that counts as rounding: machines may sum in another order."""


class Tables(Protocol):
    """Tables to compare: a run's, or a copy of earlier ones."""

    @property
    def info(self) -> dict[str, Any]:
        """Contents of the run's run.json."""

    def table(self, name: str) -> pa.Table:
        """Return one of its tables."""


@dataclass(frozen=True)
class Drift:
    """Differences between two runs."""

    k: int
    by: str
    drift: float
    """1 − the mean rank-biased overlap over concepts of both runs with new occurrences: 0 for the same rankings, 1 for
    nothing in common. Each concept counts once, however often it occurs."""
    unchanged: int
    """Concepts of both runs without new occurrences. Their rankings are the same, and `drift` ignores them."""
    same_model: bool
    """Whether the checkpoints have the same digest."""
    new: list[str]
    vanished: list[str]
    concepts: pa.Table
    """Columns of `CONCEPTS`, the least alike first."""
    neurons: pa.Table
    """One row per neuron: fraction of active tokens and mean activation in both runs, and the shift of the mean in
    standard deviations; the largest shift first."""

    def summary(self, limit: int | None = None) -> dict[str, Any]:
        """Return the drift as plain values, with at most `limit` rows of each table."""
        tables = {name: getattr(self, name).slice(0, limit).to_pylist() for name in ("concepts", "neurons")}
        return vars(self) | tables


def compare(before: Tables, after: Tables, k: int = 50, by: str = "score") -> Drift:
    """Return the drift of the k highest neurons of each concept, by score or by specific.

    Raises InputError if the models have different shapes, because their neurons then don't correspond.
    """
    if by not in ORDERS:
        raise InputError(f"unknown order {by!r}; choose from {', '.join(ORDERS)}")
    if before.info["model"]["widths"] != after.info["model"]["widths"]:
        raise InputError("the runs' models have different shapes; compare runs of the same architecture")
    old, new = (_by_concept(run.table("rankings"), by) for run in (before, after))
    both = sorted(old.keys() & new.keys())
    rows = [_concept(concept, old[concept], new[concept], k) for concept in both]
    # The least similar first; unchanged concepts last, because the drift ignores them.
    rows.sort(key=lambda row: (not row["changed"], row["overlap"], row["concept"]))
    overlaps = [row["overlap"] for row in rows if row["changed"]]
    return Drift(
        k=k,
        by=by,
        # Without changed concepts: 1 if no concept is common to both runs, else 0.
        drift=1 - float(np.mean(overlaps)) if overlaps else float(bool(old or new) and not rows),
        unchanged=len(rows) - len(overlaps),
        same_model=before.info["digests"]["model"] == after.info["digests"]["model"],
        new=sorted(new.keys() - old.keys()),
        vanished=sorted(old.keys() - new.keys()),
        concepts=pa.Table.from_pylist(rows, schema=CONCEPTS),
        neurons=_neurons(before.table("neurons"), after.table("neurons")),
    )


def rank_biased_overlap(first: list[str], second: list[str], persistence: float = PERSISTENCE) -> float:
    """Return the extrapolated rank-biased overlap of two rankings, 0 to 1, over the length of the shorter one.

    Webber, Moffat and Zobel (2010), A similarity measure for indefinite rankings, equation 23.
    """
    depth = min(len(first), len(second))
    if not depth:
        return float(not first and not second)
    seen_first: set[str] = set()
    seen_second: set[str] = set()
    total, common = 0.0, 0
    for rank, (one, other) in enumerate(zip(first, second, strict=False), 1):
        seen_first.add(one)
        seen_second.add(other)
        # Both are added first, so an item at the same rank of both lists would count twice.
        common += (one in seen_second) + (other in seen_first) - (one == other)
        total += common / rank * persistence**rank
    return common / depth * persistence**depth + (1 - persistence) / persistence * total


def spearman(first: Float64[ndarray, " item"], second: Float64[ndarray, " item"]) -> float | None:
    """Return the rank correlation of two lists of scores of the same items; None if one of them is constant."""
    # Spearman is the correlation of ranks; with ties, its short formula by differences of ranks would be wrong.
    ranks = [_mean_ranks(scores) for scores in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale else None


@dataclass(frozen=True)
class _Ranking:
    n: int
    neurons: list[str]
    """Highest first."""
    scores: dict[str, float]
    """Values of the column that is compared."""
    raw: dict[str, float]
    """Values of `score`, which unlike `specific` does not depend on other concepts."""


def _by_concept(rankings: pa.Table, by: str) -> dict[str, _Ranking]:
    ordered = rankings.sort_by([("concept", "ascending"), (ORDERS[by], "ascending")])
    columns = [ordered[name].to_pylist() for name in ("concept", "n", "neuron", by, "score")]
    found: dict[str, _Ranking] = {}
    for concept, n, neuron, value, score in zip(*columns, strict=True):
        ranking = found.setdefault(concept, _Ranking(n, [], {}, {}))
        ranking.neurons.append(neuron)
        ranking.scores[neuron] = value
        ranking.raw[neuron] = score
    return found


def _concept(concept: str, old: _Ranking, new: _Ranking, k: int) -> dict[str, Any]:
    first, second = old.neurons[:k], new.neurons[:k]
    together = set(first) | set(second)
    # A neuron outside a run's ranking has no score there.
    known = sorted(neuron for neuron in together if neuron in old.scores and neuron in new.scores)
    scores = (np.array([ranking.scores[neuron] for neuron in known]) for ranking in (old, new))
    return {
        "concept": concept,
        "n_before": old.n,
        "n_after": new.n,
        "overlap": rank_biased_overlap(first, second),
        "jaccard": len(set(first) & set(second)) / len(together),
        "spearman": spearman(*scores) if known else None,
        "changed": not _is_same(old, new),
    }


def _is_same(old: _Ranking, new: _Ranking) -> bool:
    """Return whether a concept has the same occurrences: the same number, and equal scores up to rounding."""
    shared = old.raw.keys() & new.raw.keys()
    if old.n != new.n or not shared:
        return False
    first, second = (np.array([ranking.raw[neuron] for neuron in shared]) for ranking in (old, new))
    return bool(np.allclose(first, second, rtol=0, atol=ROUNDING * np.abs(first).max()))


def _neurons(before: pa.Table, after: pa.Table) -> pa.Table:
    active, means, spreads = [], [], []
    for table in (before, after):
        active.append(table["n_active"].to_numpy() / np.maximum(table["n_tokens"].to_numpy(), 1))
        means.append(table["mean"].to_numpy())
        spreads.append(table["std"].to_numpy())
    # Pooled as for Cohen's d; a neuron that never varies has no shift.
    spread = np.sqrt((np.square(spreads[0]) + np.square(spreads[1])) / 2)
    change = means[1] - means[0]
    shift = np.divide(change, spread, out=np.zeros_like(change), where=spread > 0)
    table = pa.table(
        {
            "neuron": before["neuron"],
            "active_before": active[0],
            "active_after": active[1],
            "mean_before": means[0],
            "mean_after": means[1],
            "shift": shift,
        }
    )
    order = pc.sort_indices(pa.table({"size": np.abs(shift)}), sort_keys=[("size", "descending")])
    return table.take(order)


def _mean_ranks(scores: Float64[ndarray, " item"]) -> Float64[ndarray, " item"]:
    """Return the rank of each score from 1; equal scores share the mean of their ranks."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Float64[ndarray, " item"] = (last - (counts - 1) / 2)[inverse]
    return mean
