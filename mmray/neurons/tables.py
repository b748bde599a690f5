"""Schemas of a shard's statistics: how active each neuron was, and its most extreme samples."""

from __future__ import annotations

import pyarrow as pa

from mmray.runs.tables import field

EXAMPLES = 5
"""Highest and lowest samples kept per neuron, each of another image."""

STATISTICS: dict[str, pa.Schema] = {
    # One row per label and modality.
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
    # One row per sign and rank: every neuron's extreme sample of that rank in the shard.
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
"""Lists run over the neurons of all layers."""
