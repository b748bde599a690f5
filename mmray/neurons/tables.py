"""Sums over tokens that a part of the census holds: how active a neuron was, and at which samples most."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field

STATISTICS: dict[str, pa.Schema] = {
    "activity": pa.schema(
        [
            field("label_kind", pa.string()),
            field("label", pa.string()),
            field("modality", pa.string()),
            field("n_tokens", pa.int64()),
            field("n_active", pa.list_(pa.int64())),
            field("sum", pa.list_(pa.float64())),
            field("sum_squares", pa.list_(pa.float64())),
            field("module", pa.string()),
        ]
    ),
    # A row is a sign and rank: the shard's rank-th extreme sample of every neuron.
    "examples": pa.schema(
        [
            field("sign", pa.int8()),
            field("rank", pa.int16()),
            field("sample", pa.list_(pa.int32()), "row of the shard's captions"),
            field("position", pa.list_(pa.int32())),
            field("activation", pa.list_(pa.float32())),
        ]
    ),
}
"""A list or vector runs over the neurons of all layers."""
