"""The concepts of a run, each with its counts and its highest neurons, from the table `rankings`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.runs.tables import field

ORDERS = {
    "score": ("rank", "ascending"),
    "specific": ("specific_rank", "ascending"),
    "selective": ("selective_rank", "ascending"),
    "share": ("share", "descending"),
}
"""Sort column and direction of a ranking for each `by`; ties are broken by `rank`."""

VALUES = ("score", "specific")
"""Orders by whose highest value concepts can be compared."""

CONCEPTS = pa.schema(
    [
        field("concept", pa.string()),
        field("n", pa.int64(), "occurrences"),
        field("n_images", pa.int64(), "different images among the occurrences"),
        *(field(f"highest_{by}", pa.string(), f"neuron that is first by {by}") for by in ORDERS),
        *(field(by, pa.float64(), f"{by} of the neuron that is first by {by}") for by in VALUES),
    ]
)


def summarise_rankings(rankings: pa.Table) -> pa.Table:
    """Return one row per concept of these rankings, concepts in their order."""
    if not len(rankings):
        return CONCEPTS.empty_table()
    rankings = rankings.select(READ).combine_chunks()
    names = pc.dictionary_encode(rankings["concept"].combine_chunks())
    concept, rank = names.indices.to_numpy(), rankings["rank"].to_numpy()
    first = np.unique(concept, return_index=True)[1]
    columns = {"concept": names.dictionary} | {name: rankings[name].take(first) for name in ("n", "n_images")}
    for by, (column, direction) in ORDERS.items():
        # Runs of earlier versions have no values in some columns.
        if rankings[column].null_count:
            columns[f"highest_{by}"] = pa.nulls(len(first), pa.string())
            continue
        values = rankings[column].to_numpy() * (1 if direction == "ascending" else -1)
        # `lexsort` takes the last key as the first: by concept, then by value; rank breaks ties.
        order = np.lexsort((rank, values, concept))
        highest = rankings.take(order[np.unique(concept[order], return_index=True)[1]])
        columns[f"highest_{by}"] = highest["neuron"]
        if by in VALUES:
            columns[by] = highest[by]
    return pa.table(columns, schema=CONCEPTS)


def rankings_by_neuron(rankings: pa.Table) -> pa.Table:
    """Return the rows of rankings as the table `neuron_concepts` has them: by neuron, then by rank."""
    return rankings.sort_by([(name, "ascending") for name in ("layer", "unit", "rank")])


READ = ["concept", "neuron", "n", "n_images", *dict.fromkeys(column for column, _ in ORDERS.values()), *VALUES]
"""Columns of `rankings` that this needs."""
