"""Tables of a census with the unit of each column, and the parts that a shard commits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mmray.neurons.tables import STATISTICS
from mmray.runs.concepts import CONCEPTS
from mmray.runs.tables import ERRORS, LABEL_ENTRY, SPAN_ENTRY, field, ordered

SCORE = "by score: logit before the final norm (after it with fold_norm); gradients: logit; effect: log-odds"
ACTIVATION = "activation"
COUNT = "count"
EXACT = (
    "whether every shard with the concept kept the neuron; if not, score, score_std, specific, selective and "
    "activation lack the shards that left it out"
)

NEURON_ENTRY = pa.struct(
    [("layer", pa.int16()), ("unit", pa.int32()), ("score", pa.float32()), ("activation", pa.float32())]
)

TABLES: dict[str, pa.Schema] = {
    "captions": ordered(
        [
            field("sample_id", pa.string()),
            field("caption", pa.string()),
            field("source", pa.string(), "dataset or generated"),
            field("language", pa.string()),
            field("domain", pa.string()),
            field("shard_id", pa.int32()),
            field("labels", pa.list_(LABEL_ENTRY), "further labels of --label-column: key the column, value the label"),
            field(
                "image", pa.string(), "digest of its bytes; of a window: of the text it is cut from; null: a whole text"
            ),
            field("token_spans", pa.list_(SPAN_ENTRY), "characters of the caption that each of its tokens covers"),
            field("text_start", pa.int32(), "index of the caption's first token in the unpadded sequence"),
            field("image_spans", pa.list_(SPAN_ENTRY), "indices of the image's tokens in it"),
        ],
        "shard_id",
    ),
    "occurrences": pa.schema(
        [
            field("sample_id", pa.string()),
            field("concept", pa.string()),
            field("token", pa.string()),
            field("token_id", pa.int32()),
            field("position", pa.int32(), "index in the unpadded sequence of the position that predicts the token"),
            field("log_prob", pa.float32(), "nat"),
            field("neurons", pa.list_(NEURON_ENTRY), SCORE),
        ]
    ),
    "rankings": ordered(
        [
            field("concept", pa.string()),
            field("rank", pa.int32(), "from 1, by score"),
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("score", pa.float64(), SCORE),
            field("score_std", pa.float64(), SCORE),
            field("specific", pa.float64(), SCORE),
            field("specific_rank", pa.int32(), "from 1, by specific"),
            field("n", pa.int64(), "occurrences"),
            field("share", pa.float64(), "fraction of occurrences with the neuron in their top_k, 0 to 1"),
            field("activation", pa.float64(), ACTIVATION),
            field(
                "tokens",
                pa.list_(pa.string()),
                "the ten it writes here, highest first; if its mean activation is negative, those it suppresses",
            ),
            field("certified", pa.bool_(), "whether its rank by score is certain, whatever the shards left out"),
            field("selective", pa.float64(), SCORE),
            field("selective_rank", pa.int32(), "from 1, by selective"),
            field("n_images", pa.int64(), "different images among the occurrences"),
            field("certified_specific", pa.bool_(), "whether its rank by specific is certain"),
            field("certified_selective", pa.bool_(), "whether its rank by selective is certain"),
            field("exact", pa.bool_(), EXACT),
        ],
        "concept",
        "rank",
    ),
    "neurons": ordered(
        [
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("n_concepts", pa.int32(), "concepts that have it in their top_k by score"),
            field("n_tokens", pa.int64(), COUNT),
            field("n_active", pa.int64(), "tokens at which the gate is open"),
            field("mean", pa.float64(), ACTIVATION),
            field("std", pa.float64(), ACTIVATION),
            field("max", pa.float32(), ACTIVATION),
            field("min", pa.float32(), ACTIVATION),
            field("tokens", pa.list_(pa.string()), "the ten it promotes most, highest first"),
            field("suppressed", pa.list_(pa.string()), "the ten it suppresses most, lowest first"),
        ],
        "layer",
        "unit",
    ),
    "activity": pa.schema(
        [
            field("label_kind", pa.string()),
            field("label", pa.string()),
            field("modality", pa.string(), "image or text"),
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("n_tokens", pa.int64(), COUNT),
            field("n_active", pa.int64(), "tokens at which the gate is open"),
            field("sum", pa.float64(), ACTIVATION),
            field("sum_squares", pa.float64(), "activation squared"),
            field("module", pa.string(), "language, or what --module adds"),
        ]
    ),
    "examples": ordered(
        [
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("sign", pa.int8(), "+1 highest, -1 lowest"),
            field("rank", pa.int16(), "from 1"),
            field("sample_id", pa.string()),
            field("position", pa.int32(), "index in the unpadded sequence"),
            field("activation", pa.float32(), ACTIVATION),
            field("shard_id", pa.int32(), "shard of the sample"),
        ],
        "layer",
        "unit",
    ),
    "errors": ERRORS,
    "concepts": CONCEPTS,
}
# The rankings once more, for readers who ask about a neuron.
TABLES["neuron_concepts"] = ordered(
    [
        TABLES["rankings"].field(name)
        for name in ("layer", "unit", "concept", "rank", "score", "specific", "specific_rank", "selective", "share")
    ]
    + [TABLES["rankings"].field(name) for name in ("n", "activation")],
    "layer",
    "unit",
    "rank",
)
"""The tables that a finished run offers to its readers."""


PARTS: dict[str, pa.Schema] = {
    "captions": TABLES["captions"],
    "occurrences": TABLES["occurrences"],
    "errors": TABLES["errors"],
    # A row per concept, or several of one that was closed early; lists run over its kept neurons.
    "concepts": pa.schema(
        [
            field("concept", pa.string()),
            field("n", pa.int64(), "occurrences"),
            field("bound", pa.float64(), "largest sum of scores among neurons not kept"),
            field("floor", pa.float64(), "smallest sum of scores among neurons not kept"),
            field("neuron", pa.list_(pa.int32()), "index over all layers; null: all neurons are kept"),
            field("score", pa.list_(pa.float64()), "sum over occurrences"),
            field("score_squares", pa.list_(pa.float64()), "sum of squares over occurrences; null where n is 1"),
            field("activation", pa.list_(pa.float32()), "sum over occurrences"),
        ]
    ),
    # One row: sums over all occurrences of all concepts, one number per neuron.
    "totals": pa.schema(
        [
            field("n", pa.int64(), "occurrences"),
            field("score", pa.list_(pa.float64()), "sum"),
            field("score_squares", pa.list_(pa.float64()), "sum of squares"),
        ]
    ),
    # In `activity`, lists are null where they are those of the label "all".
    **STATISTICS,
    # The tokens that each neuron writes, one row per neuron; one such table per run.
    "decoded": pa.schema([field("tokens", pa.list_(pa.string())), field("suppressed", pa.list_(pa.string()))]),
}
"""Parts that one unit of work commits; the merge adds them up."""

SUMS: dict[str, type[np.float64 | np.float32]] = {
    "score": np.float64,
    "score_squares": np.float64,
    "activation": np.float32,
}
"""Columns of sums over a concept's occurrences, in order of accumulation, with their type in a committed part."""
