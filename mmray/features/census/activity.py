"""A shard's activity as it is committed: lists that repeat those of the label "all" are left out.

Most often all samples of a shard have one language, so each neuron's numbers would be there twice.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy import ndarray

from mmray.runs.tables import list_values

ActivityKey = tuple[str, str, str, str]
"""Module, kind of label, label, modality."""
KEY = ("module", "label_kind", "label", "modality")
LISTS = ("n_active", "sum", "sum_squares")


def without_repeats(activity: pa.Table) -> pa.Table:
    """Return the table with null for lists that are those of the label "all"."""
    numbers = activity_lists(activity)
    repeats = [
        key != _of_all(key) and all(map(np.array_equal, lists, numbers[_of_all(key)])) for key, lists in numbers.items()
    ]
    for name in LISTS:
        column = activity[name].combine_chunks()
        kept = [None if repeated else row for row, repeated in enumerate(repeats)]
        activity = activity.set_column(
            activity.schema.get_field_index(name), activity.schema.field(name), column.take(pa.array(kept, pa.int64()))
        )
    return activity


def activity_lists(activity: pa.Table) -> dict[ActivityKey, tuple[ndarray, ...]]:
    """Return the lists of each row by its key, with those that were left out."""
    keys = zip(*(activity[name].to_pylist() for name in KEY), strict=True)
    lists = dict(zip(keys, zip(*(list_values(activity[name]) for name in LISTS), strict=True), strict=True))
    # A null list is read as an empty one.
    return {key: found if len(found[0]) else lists[_of_all(key)] for key, found in lists.items()}


def _of_all(key: ActivityKey) -> ActivityKey:
    return key[0], "all", "all", key[3]
